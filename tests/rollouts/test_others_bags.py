"""Bags of other recorders, here of the rosbags library's: both storages, every compression."""

import os

import pytest
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts.bag import read_messages
from rlrc_ros.rollouts.repair import repair
from rlrc_ros.rollouts.verify import verify
from tests.rollouts.bags import SECOND, STRING, STRING_DEFINITION, STRING_HASH, string

SQLITE3, MCAP = StoragePlugin.SQLITE3, StoragePlugin.MCAP
KINDS = [
    (storage, mode)
    for storage in StoragePlugin
    for mode in CompressionMode
    if (storage, mode) != (SQLITE3, CompressionMode.STORAGE)  # which there is none of
]


def others_bag(path, storage, mode):
    writer = Writer(path, version=9, storage_plugin=storage)
    if mode != CompressionMode.NONE:
        writer.set_compression(mode, CompressionFormat.ZSTD)
    with writer:
        connection = writer.add_connection(
            "/text", STRING, msgdef=STRING_DEFINITION, rihs01=STRING_HASH
        )
        for k in [*range(10), *range(15, 25)]:
            writer.write(connection, SECOND + k * SECOND // 10, string(f"text {k}"))
    return path


@pytest.mark.parametrize(("storage", "mode"), KINDS)
def test_it_is_read_and_verified(tmp_path, storage, mode):
    bag = others_bag(tmp_path / "bag", storage, mode)
    report = verify(bag)
    assert report.ok and report.episode is None, report.problems
    assert report.messages == 20 and report.duration == pytest.approx(2.4)
    (topic,) = report.topics
    assert (topic.topic, topic.type, topic.messages, topic.gaps) == ("/text", STRING, 20, 1)
    assert [m.data for _, m, _ in read_messages(bag)][-1] == "text 24"


def test_a_file_alone_is_verified_too(tmp_path):
    bag = others_bag(tmp_path / "bag", MCAP, CompressionMode.STORAGE)
    (file,) = bag.glob("*.mcap")
    assert verify(file).ok and verify(file).messages == 20
    os.truncate(file, file.stat().st_size - 60)
    assert "truncated" in verify(file).problems[0]


@pytest.mark.parametrize(
    ("storage", "mode"), [(SQLITE3, CompressionMode.NONE), (MCAP, CompressionMode.FILE)]
)
def test_one_that_is_cut_off_is_a_problem_in_one_line(tmp_path, storage, mode):
    bag = others_bag(tmp_path / "bag", storage, mode)
    (file,) = [path for path in bag.iterdir() if path.suffix != ".yaml"]
    os.truncate(file, file.stat().st_size // 2)
    report = verify(bag)
    assert not report.ok and "\n" not in "".join(report.problems)


@pytest.mark.parametrize("mode", [CompressionMode.MESSAGE, CompressionMode.STORAGE])
def test_one_of_compressed_messages_is_repaired(tmp_path, mode):
    bag = others_bag(tmp_path / "bag", MCAP, mode)
    (file,) = bag.glob("*.mcap")
    os.truncate(file, file.stat().st_size - 60)
    assert repair(bag).messages == 20
    assert verify(bag).ok and [m.data for _, m, _ in read_messages(bag)][-1] == "text 24"


def test_a_directory_of_other_things_is_no_bag(tmp_path):
    (tmp_path / "x.db3").write_text("nothing")
    with pytest.raises(UserError, match="is not a bag"):
        verify(tmp_path)
