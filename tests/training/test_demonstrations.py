import numpy as np
import pytest

from rlrc_ros.errors import UserError
from training.data.demonstrations import (
    Episode,
    encode_png,
    read,
    read_proprioception,
    write_shard,
)


def episode(steps, instruction, seed):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (steps, 16, 16, 3), dtype=np.uint8)
    numbers = [rng.normal(size=(steps, n)).astype(np.float32) for n in (8, 7, 4)]
    facts = {"instruction": instruction, "seed": seed}
    return frames, Episode([encode_png(frame) for frame in frames], *numbers, facts)


def test_what_is_written_reads_back_exactly(tmp_path):
    parts = [episode(3, "push it", 0), episode(5, "lift it", 1), episode(2, "push it", 2)]
    write_shard(tmp_path / "shard-00000.safetensors", [e for _, e in parts[:2]])
    write_shard(tmp_path / "shard-00001.safetensors", [e for _, e in parts[2:]])
    data = read(tmp_path)
    assert len(data) == 10
    np.testing.assert_array_equal(data.images, np.concatenate([frames for frames, _ in parts]))
    for name in ("proprioception", "actions", "grounding"):
        expected = np.concatenate([getattr(e, name) for _, e in parts])
        np.testing.assert_array_equal(getattr(data, name), expected)
    np.testing.assert_array_equal(read_proprioception(tmp_path), data.proprioception)
    texts = [data.instructions[i] for i in data.prompts]
    assert texts == ["push it"] * 3 + ["lift it"] * 5 + ["push it"] * 2
    assert [facts["steps"] for facts in data.episodes] == [3, 5, 2]


def test_no_demonstrations(tmp_path):
    with pytest.raises(UserError, match="no demonstrations there"):
        read(tmp_path)
    with pytest.raises(UserError, match="no demonstrations there"):
        read_proprioception(tmp_path)


@pytest.mark.parametrize("cut", [10, 500])
def test_a_damaged_shard_is_named(tmp_path, cut):
    path = tmp_path / "shard-00000.safetensors"
    write_shard(path, [episode(3, "push it", 0)[1]])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"shard-00000\.safetensors: not a readable shard"):
        read(tmp_path)
