"""Where the package's own configuration files are: checkout, wheel, or ROS install space."""

from __future__ import annotations

import sys
from pathlib import Path

from rlrc_ros.errors import UserError


def config_file(kind: str, name: str | Path) -> Path:
    """A file given by path, or one of the package's own by name: `config_file("robots", "sim")`.

    Raises:
        UserError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    directories = [root / "config" / kind for root in _roots()]
    for directory in directories:
        if (file := directory / f"{name}.yaml").is_file() and Path(name).name == str(name):
            return file
    names = sorted({file.stem for directory in directories for file in directory.glob("*.yaml")})
    raise UserError(f"{name}: no such file, and not among {', '.join(names) or 'none installed'}")


def _roots() -> list[Path]:
    module = Path(__file__).resolve()
    # install/rlrc/lib/python3.x/site-packages/rlrc_ros/paths.py -> install/rlrc/share/rlrc
    beside = [parent / "share" / "rlrc" for parent in module.parents[3:6]]
    return [module.parent.parent, *beside, Path(sys.prefix) / "share" / "rlrc"]
