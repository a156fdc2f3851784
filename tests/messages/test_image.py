from array import array
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlrc_ros.errors import UserError
from rlrc_ros.messages import image
from rlrc_ros.messages.image import image_to_rgb, rgb_to_image

CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}
ORDER = {"rgb8": [0, 1, 2], "bgr8": [2, 1, 0], "rgba8": [0, 1, 2], "bgra8": [2, 1, 0]}
ORDER["mono8"] = [0, 0, 0]
as_array, as_ndarray = (lambda data: array("B", data)), (lambda data: np.frombuffer(data, np.uint8))


def message(pixels, encoding, padding=0, container=bytes, **fields):
    """An Image with the fields that a message has, whoever made it."""
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, width * pixels.shape[2])
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    fields = {
        "height": height,
        "width": width,
        "encoding": encoding,
        "is_bigendian": 0,
        "step": padded.shape[1],
        "data": container(padded.tobytes()),
        **fields,
    }
    return SimpleNamespace(**fields)


def compressed(data, format_):
    return SimpleNamespace(format=format_, data=data)


def noise(height=6, width=8, channels=3):
    return np.random.default_rng(0).integers(0, 255, (height, width, channels), np.uint8)


@pytest.mark.parametrize("with_cv_bridge", [True, False])
@pytest.mark.parametrize("container", [bytes, as_array, as_ndarray])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", CHANNELS)
def test_every_encoding_gives_the_same_picture(
    encoding, padding, container, with_cv_bridge, monkeypatch
):
    if not with_cv_bridge:
        monkeypatch.setattr(image, "_BRIDGE", None)
    elif image._BRIDGE is None:
        pytest.skip("cv_bridge is not installed")
    pixels = noise(channels=CHANNELS[encoding])
    rgb = image_to_rgb(message(pixels, encoding, padding, container))
    assert rgb.dtype == np.uint8
    assert np.array_equal(rgb, pixels[..., ORDER[encoding]])


@pytest.mark.parametrize("encoding", CHANNELS)
def test_the_big_endian_flag_means_nothing_for_bytes(encoding):
    pixels = noise(channels=CHANNELS[encoding])
    rgb = image_to_rgb(message(pixels, encoding, is_bigendian=1))
    assert np.array_equal(rgb, pixels[..., ORDER[encoding]])


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_patterns_are_read_from_the_upper_left(pattern):
    """A uniform colour, mosaicked as the pattern's name says, comes out as it was."""
    colour = {"r": 200, "g": 100, "b": 30}
    tile = np.array([colour[letter] for letter in pattern]).reshape(2, 2)
    mosaic = np.tile(tile, (8, 8)).astype(np.uint8)[..., None]
    rgb = image_to_rgb(message(mosaic, f"bayer_{pattern}8"))
    assert np.array_equal(rgb[4:-4, 4:-4], np.full((8, 8, 3), [200, 100, 30]))


@given(
    pixels=arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))),
    transposed=st.booleans(),
)
def test_an_array_comes_back_from_its_message(pixels, transposed):
    pytest.importorskip("sensor_msgs")
    from builtin_interfaces.msg import Time

    if transposed:  # not contiguous
        pixels = pixels.transpose(1, 0, 2)
    there = rgb_to_image(pixels, Time(sec=3, nanosec=4), "camera")
    assert (there.header.stamp.sec, there.header.frame_id) == (3, "camera")
    assert np.array_equal(image_to_rgb(there), pixels)


def test_pictures_of_a_bag_are_read_like_live_ones():
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.LATEST)
    types = store.types
    header = types["std_msgs/msg/Header"](
        stamp=types["builtin_interfaces/msg/Time"](sec=1, nanosec=2), frame_id="camera"
    )
    pixels = noise()
    made = types["sensor_msgs/msg/Image"](
        header=header, height=6, width=8, encoding="bgr8", is_bigendian=0, step=24,
        data=pixels.reshape(-1),
    )  # fmt: skip
    data = store.serialize_cdr(made, "sensor_msgs/msg/Image")
    read = store.deserialize_cdr(data, "sensor_msgs/msg/Image")
    assert np.array_equal(image_to_rgb(read), pixels[..., ::-1])


@pytest.mark.parametrize("format_", ["png", "rgb8; png compressed bgr8", "bgr8; png compressed "])
@pytest.mark.parametrize("container", [bytes, as_array, as_ndarray])
def test_a_png_is_decoded_exactly(container, format_):
    pixels = noise()
    data = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
    assert np.array_equal(image_to_rgb(compressed(container(data), format_)), pixels)


def test_the_order_that_a_transport_did_not_swap_is_kept():
    pixels = noise()
    data = cv2.imencode(".png", pixels)[1].tobytes()  # RGB handed over as if it were BGR
    rgb = image_to_rgb(compressed(data, "rgb8; png compressed rgb8"))
    assert np.array_equal(rgb, pixels)


def test_a_jpeg_is_decoded_to_rgb():
    picture = np.full((32, 32, 3), [250, 120, 10], np.uint8)
    data = cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes()
    rgb = image_to_rgb(compressed(data, "jpeg")).astype(int)
    assert rgb.shape == (32, 32, 3) and np.abs(rgb - picture).max() < 4


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (message(noise(), "16UC1"), "'16UC1' .8×6. is no picture .*accepted: rgb8, bgr8"),
        (message(noise(), "rgb8", data=b"123"), "3 bytes, step 24 for 8×6 rgb8"),
        (message(noise(), "rgb8", step=23, data=bytes(138)), "wanted step ≥ 24"),
        (message(noise(0), "rgb8"), "no pixels: width 8, height 0"),
        (compressed(b"", "jpeg"), "'jpeg' .0 bytes. cannot be decoded"),
        (compressed(b"nonsense", "jpeg"), "cannot be decoded"),
        (compressed(b"x", "16UC1; png compressed "), "holds no 8-bit picture"),
        (compressed(b"x", "32FC1; compressedDepth"), "holds no 8-bit picture"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(bad, words):
    with pytest.raises(UserError, match=words) as error:
        image_to_rgb(bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 2), np.uint8), np.zeros((2, 2, 4), np.uint8), np.zeros((2, 2, 3))]
)
def test_what_is_no_rgb_array_is_refused(bad):
    with pytest.raises(UserError, match=r"takes a .height, width, 3. uint8"):
        rgb_to_image(bad, None, "camera")
