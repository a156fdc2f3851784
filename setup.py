"""Metadata stand in setup.cfg, which CMakeLists.txt reads the entry points from too.

Only what names a file stands here: CMake copies setup.cfg to where there is no README.md.
"""

from pathlib import Path

from setuptools import setup

setup(
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
)
