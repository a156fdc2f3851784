"""Everything stands in setup.cfg, which CMakeLists.txt reads its entry points from too."""

from setuptools import setup

setup()
