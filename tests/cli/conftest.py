"""Command lines in this process, and policies and disks for them."""

import shutil
import subprocess

import pytest

from rlrc_ros.cli.main import main
from rlrc_ros.sim.tasks import VOCABULARY
from rlrc_ros.vla import bundle as bundles
from rlrc_ros.vla import quantization
from rlrc_ros.vla.bundle import FILES, SUMS, provenance, sha256, write_bundle
from rlrc_ros.vla.processor import word_tokenizer
from tests.conftest import NF4, bundle_config, random_model, tower


def seal(path):
    """Make the checksums right again after tampering."""
    (path / SUMS).write_text("".join(f"{sha256(path / name)}  {name}\n" for name in FILES))


def tabletop_bundle(path, quantized=False, layers=((1, 1, 64), (1, 1, 64), (1, 1, 64))):
    """A policy that fits the tabletop and can do nothing."""
    base = bundle_config(layers).architecture
    architecture = type(base)(
        towers=(tower(image_size=128),), decoder=base.decoder, proprioception=8
    )
    changes = {"architecture": architecture, "quantization": NF4 if quantized else None}
    config = bundle_config(layers, **changes)
    model = random_model(config)
    if quantized:
        quantization.quantize(model, NF4)
    tokenizer = word_tokenizer([*VOCABULARY, "in", ":", "out"])
    return write_bundle(
        path, config, quantization.stored(model), tokenizer, provenance(None, "original")
    )


@pytest.fixture(scope="session")
def policies(tmp_path_factory):
    """A directory with two bundles, named as the shipped ones."""
    directory = tmp_path_factory.mktemp("bundles")
    tabletop_bundle(directory / "tabletop-original")
    tabletop_bundle(directory / "tabletop-compressed", quantized=True)
    return directory


@pytest.fixture
def shipped(policies, monkeypatch):
    """As if these were the bundles that come with the package."""
    monkeypatch.setattr(bundles, "SHIPPED", policies)
    return policies


@pytest.fixture
def policy(policies, tmp_path):
    """The path of a bundle to damage."""
    return shutil.copytree(policies / "tabletop-original", tmp_path / "policy")


@pytest.fixture
def rlrc(capfd):
    """rlrc(words…) → (exit status, standard output, standard error)."""

    def run(*words):
        capfd.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as exit_:
            status = exit_.code or 0
        out, err = capfd.readouterr()
        return status, out, err

    return run


@pytest.fixture
def refused(rlrc):
    """refused(words…) → the one line that tells what is wrong."""

    def run(*words):
        status, out, err = rlrc(*words)
        assert status == 2, (status, out, err)
        assert out == ""
        assert err.startswith("rlrc") and err.endswith("\n") and err.count("\n") == 1, err
        return err

    return run


@pytest.fixture
def disk(tmp_path):
    """disk(options) → a small file system of its own; skips where mounting is not allowed."""
    mounted = []

    def mount(options):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)
