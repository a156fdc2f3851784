"""Camera messages to arrays and back.

Messages may come from rclpy or from a bag read with rosbags: only their fields are looked at, and
`data` may be an `array('B')`, bytes or an ndarray.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from rlrc_ros.errors import UserError

try:
    from cv_bridge import CvBridge
# AttributeError: built against another numpy than the one installed
except (ImportError, AttributeError):
    CvBridge = None

if TYPE_CHECKING:
    from sensor_msgs.msg import Image

_BRIDGE = CvBridge() if CvBridge is not None else None

# encoding: bytes per pixel, and OpenCV's conversion to RGB (None: it is RGB)
_ENCODINGS: dict[str, tuple[int, int | None]] = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "rgba8": (4, cv2.COLOR_RGBA2RGB),
    "bgra8": (4, cv2.COLOR_BGRA2RGB),
    "mono8": (1, cv2.COLOR_GRAY2RGB),
    "bayer_rggb8": (1, cv2.COLOR_BayerRGGB2RGB),
    "bayer_bggr8": (1, cv2.COLOR_BayerBGGR2RGB),
    "bayer_gbrg8": (1, cv2.COLOR_BayerGBRG2RGB),
    "bayer_grbg8": (1, cv2.COLOR_BayerGRBG2RGB),
}
_BRIDGED = ("rgb8", "bgr8", "rgba8", "bgra8", "mono8")


def image_to_rgb(message: Any) -> np.ndarray:
    """The picture in a sensor_msgs Image or CompressedImage, (height, width, 3) uint8 RGB.

    An rgb8 image is not copied: the array then shares its memory with the message. Row padding
    (`step`) is honoured. `is_bigendian` changes nothing in the encodings that are accepted, which
    all have one byte a channel.

    Raises:
        UserError: An encoding that is not accepted, no pixels, or data that does not fit the size.
    """
    return _decompress(message) if hasattr(message, "format") else _convert(message)


def _convert(message: Any) -> np.ndarray:
    encoding, height, width, step = message.encoding, message.height, message.width, message.step
    if encoding not in _ENCODINGS:
        raise UserError(
            f"image encoding {encoding!r} ({width}×{height}) is no picture of 8 bits a channel;"
            f" accepted: {', '.join(_ENCODINGS)}, and CompressedImage (jpeg, png)"
        )
    channels, code = _ENCODINGS[encoding]
    data = np.frombuffer(message.data, np.uint8)
    if not height or not width:
        raise UserError(f"image has no pixels: width {width}, height {height}, encoding {encoding}")
    if step < width * channels or len(data) != height * step:
        raise UserError(
            f"image data does not fit its size: {len(data)} bytes, step {step} for {width}×{height}"
            f" {encoding}; wanted step ≥ {width * channels} and height × step bytes"
        )
    if (
        _BRIDGE is not None
        and encoding in _BRIDGED
        and step == width * channels
        and not message.is_bigendian
    ):
        # cv_bridge ignores `step`, and on a big-endian flag it calls what numpy 2 has removed.
        return _BRIDGE.imgmsg_to_cv2(message, "rgb8")
    rows = data.reshape(height, step)[:, : width * channels]
    pixels = rows.reshape(height, width, channels) if channels > 1 else rows
    return pixels if code is None else cv2.cvtColor(pixels, code)


def _decompress(message: Any) -> np.ndarray:
    format_, size = message.format, len(message.data)
    encoding, _, codec = format_.partition(";")
    if encoding.startswith(("16", "32", "64", "mono16")) or "compressedDepth" in codec:
        raise UserError(
            f"compressed image of format {format_!r} ({size} bytes) holds no 8-bit picture;"
            " accepted: jpeg, png"
        )
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    picture = cv2.imdecode(np.frombuffer(message.data, np.uint8), flags) if size else None
    if picture is None:
        raise UserError(
            f"compressed image of format {format_!r} ({size} bytes) cannot be decoded;"
            " accepted: jpeg, png"
        )
    # compressed_image_transport names the order it handed to the encoder, which took it for BGR:
    # "rgb8; jpeg compressed bgr8" decodes to BGR, "rgb8; jpeg compressed rgb8" to RGB.
    return picture if "compressed rgb" in codec else cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def rgb_to_image(rgb: np.ndarray, stamp: Any, frame_id: str) -> Image:
    """An rgb8 sensor_msgs/Image of a (height, width, 3) uint8 array.

    Args:
        rgb: Any memory layout; copied.
        stamp: builtin_interfaces/Time of the exposure.
        frame_id: The camera's optical frame (z forward, x right, y down).
    """
    from sensor_msgs.msg import Image

    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise UserError(
            f"an rgb8 image takes a (height, width, 3) uint8 array, not {rgb.shape} {rgb.dtype}"
        )
    message = Image()
    message.header.stamp = stamp
    message.header.frame_id = frame_id
    message.height, message.width = rgb.shape[:2]
    message.encoding = "rgb8"
    message.step = 3 * rgb.shape[1]
    # The one assignment that rclpy does not walk through byte by byte: 0.04 ms for 640×480, where
    # an ndarray takes 107.
    pixels = array("B")
    pixels.frombytes(np.ascontiguousarray(rgb).data.cast("B"))
    message.data = pixels
    return message
