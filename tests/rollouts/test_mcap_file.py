import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.reader import make_reader
from mcap.stream_reader import StreamReader
from mcap.writer import CompressionType, Writer
from rosbags.rosbag2 import CompressionFormat, CompressionMode, Reader, StoragePlugin
from rosbags.rosbag2 import Writer as RosbagsWriter

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts.mcap_file import McapWriter, scan
from tests.rollouts.bags import STRING, STRING_DEFINITION, STRING_HASH, string

messages = st.lists(
    st.tuples(
        st.integers(1, 2), st.integers(0, 10**18), st.integers(0, 2**63), st.binary(max_size=60)
    ),
    max_size=12,
)


def written(path, batches, closed=True):
    """A file with a chunk for every batch of (channel, log time, publish time, data)."""
    path.unlink(missing_ok=True)
    writer = McapWriter(path)
    for topic in ("/a", "/b"):
        writer.add_channel(topic, "pkg/msg/T", "uint8[] data\n", {"offered_qos_profiles": ""})
    for batch in batches:
        for message in batch:
            writer.write(*message)
        writer.write_chunk()
    if closed:
        writer.close()
    return [message for batch in batches for message in batch]


def read_with_mcap(data):
    """What the mcap library reads in a file's order, every checksum verified."""
    reader = make_reader(io.BytesIO(data), validate_crcs=True)
    return [
        (m.channel_id, m.log_time, m.publish_time, m.data)
        for _, _, m in reader.iter_messages(log_time_order=False)
    ]


def read_with_rosbags(path):
    with Reader(path) as reader:
        return sorted((c.id, time, bytes(data)) for c, time, data in reader.messages())


def without_publish_time(messages):
    return sorted((channel, log, data) for channel, log, _, data in messages)


@settings(max_examples=40)
@given(batches=st.lists(messages, max_size=4))
def test_both_libraries_read_what_was_written(batches, tmp_path_factory):
    path = tmp_path_factory.mktemp("mcap") / "x.mcap"
    all_ = written(path, batches)
    assert read_with_mcap(path.read_bytes()) == all_
    assert read_with_rosbags(path) == without_publish_time(all_)
    summary = make_reader(io.BytesIO(path.read_bytes())).get_summary()
    assert summary.statistics.message_count == len(all_)
    assert summary.statistics.chunk_count == sum(1 for batch in batches if batch)
    assert {c.topic for c in summary.channels.values()} == {"/a", "/b"}
    list(StreamReader(io.BytesIO(path.read_bytes()), validate_crcs=True).records)
    found = scan(path)
    assert not found.problem and sum(found.index.counts.values()) == len(all_)


@settings(max_examples=100)
@given(batches=st.lists(messages.filter(bool), min_size=1, max_size=4), where=st.floats(0, 1))
def test_a_file_cut_anywhere_is_whole_again_up_to_its_last_whole_chunk(
    batches, where, tmp_path_factory
):
    path = tmp_path_factory.mktemp("mcap") / "x.mcap"
    all_ = written(path, batches)
    data = path.read_bytes()
    whole = scan(path)
    ends = [chunk.offset + chunk.length for chunk in whole.index.chunks]
    first = whole.index.chunks[0].offset
    cut = first + round(where * (len(data) - 1 - first))
    path.write_bytes(data[:cut])
    found = scan(path)
    assert found.problem
    mended = data[: found.end] + found.appendix
    mended += found.index.tail(len(mended))
    kept = sum(len(batch) for batch, end in zip(batches, ends, strict=True) if end <= cut)
    assert read_with_mcap(mended) == all_[:kept]
    path.write_bytes(mended)
    assert read_with_rosbags(path) == without_publish_time(all_[:kept])
    assert not scan(path).problem


def test_a_writer_that_was_killed_leaves_all_that_it_wrote_out(tmp_path):
    path = tmp_path / "x.mcap"
    written(path, [[(1, 5, 5, b"abc")], [(2, 6, 6, b"def")]], closed=False)
    found = scan(path)
    assert found.problem == "it ends before its index"
    assert found.index.counts == {1: 1, 2: 1} and found.index.span == (5, 6)


def test_a_flipped_bit_and_all_behind_it_is_left_out(tmp_path):
    path = tmp_path / "x.mcap"
    written(path, [[(1, 5, 5, b"abc")], [(1, 6, 6, b"marker")], [(1, 7, 7, b"ghi")]])
    data = bytearray(path.read_bytes())
    data[data.index(b"marker")] ^= 1
    path.write_bytes(data)
    found = scan(path)
    assert "the chunk at byte" in found.problem and found.index.counts[1] == 1


def test_blocks_of_zeros_after_a_power_cut_are_no_records(tmp_path):
    path = tmp_path / "x.mcap"
    written(path, [[(1, 5, 5, b"abc")]], closed=False)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + bytes(4096))
    found = scan(path)
    assert found.problem and found.end == size


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("compression", [CompressionType.NONE, CompressionType.LZ4])
def test_files_of_other_writers_are_scanned_too(tmp_path, chunked, compression):
    path = tmp_path / "x.mcap"
    with path.open("wb") as file:
        writer = Writer(file, compression=compression, use_chunking=chunked)
        writer.start("ros2")
        schema = writer.register_schema("pkg/msg/T", "ros2msg", b"uint8[] data\n")
        channel = writer.register_channel("/a", "cdr", schema)
        for k in range(5):
            writer.add_message(channel, k, b"abc" * 100, k)
        writer.finish()
    found = scan(path)
    assert not found.problem
    assert {topic: count for topic, (_, count) in found.index.topics().items()} == {"/a": 5}
    assert found.index.times(channel) == [0, 1, 2, 3, 4]


def test_chunks_compressed_by_rosbags_are_scanned_too(tmp_path):
    writer = RosbagsWriter(tmp_path / "x", version=9, storage_plugin=StoragePlugin.MCAP)
    writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
    with writer:
        connection = writer.add_connection(
            "/text", STRING, msgdef=STRING_DEFINITION, rihs01=STRING_HASH
        )
        for k in range(5):
            writer.write(connection, k, string("abc" * 100))
    found = scan(tmp_path / "x" / "x.mcap")
    assert not found.problem and found.index.times(1) == [0, 1, 2, 3, 4]
    assert found.index.chunks[0].compression == "zstd"


def test_what_is_no_mcap_file_is_refused(tmp_path):
    path = tmp_path / "x.mcap"
    path.write_bytes(b"nonsense, but more than eight bytes")
    with pytest.raises(UserError, match=r"x\.mcap is not an MCAP file"):
        scan(path)
