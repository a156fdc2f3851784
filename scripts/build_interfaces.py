"""Build msg, srv and action into the virtual environment this script runs in.

    .venv/bin/python scripts/build_interfaces.py

Only for ROS 2 from PyPI wheels. With an apt-installed distribution, `colcon build` in a workspace
does all of it.

The wheels' CMake targets name the Python that they were built with; they are pointed at this
interpreter first (which changes nothing the second time). Then colcon builds the package's
interfaces, and the message of /tf, which no wheel has, and installs them into the environment's own
prefix, where the wheels' libraries lie, so that `rlrc.msg` imports with nothing sourced.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy

REPOSITORY = Path(__file__).resolve().parent.parent
PREFIX = Path(sys.prefix)
BUILD = REPOSITORY / ".colcon"


def mend_wheels() -> int:
    """Point the wheels' CMake targets at this interpreter; returns how many files that changed."""
    replacements = [
        (r"/opt/python/cp\d+-cp\d+/include/python3\.\d+", sysconfig.get_path("include")),
        (
            r"/opt/python/cp\d+-cp\d+/lib/python3\.\d+/site-packages/numpy/_core/include",
            numpy.get_include(),
        ),
    ]
    changed = 0
    for file in (PREFIX / "share").glob("*/cmake/*.cmake"):
        text = mended = file.read_text()
        for pattern, ours in replacements:
            mended = re.sub(pattern, ours.replace("\\", r"\\"), mended)
        if mended != text:
            file.write_text(mended)
            changed += 1
    return changed


def main() -> int:
    """Mend, build, install, and import what was built."""
    print(f"wheels: {mend_wheels()} CMake files pointed at {sys.executable}", flush=True)
    environment = os.environ | {
        "AMENT_PREFIX_PATH": str(PREFIX),
        "CMAKE_PREFIX_PATH": str(PREFIX),
        "PATH": f"{PREFIX / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    command = [
        str(PREFIX / "bin" / "colcon"), "--log-base", str(BUILD / "log"), "build",
        "--base-paths", str(REPOSITORY), str(REPOSITORY / "scripts" / "tf2_message"),
        "--packages-select", "rlrc", "tf2_msgs",
        "--build-base", str(BUILD / "build"), "--install-base", str(PREFIX), "--merge-install",
        "--cmake-args", "-DRLRC_INTERFACES_ONLY=ON", "-DBUILD_TESTING=OFF",
        f"-DPython3_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    built = subprocess.run(command, cwd=REPOSITORY, env=environment)
    if built.returncode:
        print(
            f"the interfaces did not build; colcon's logs are under {BUILD / 'log'}",
            file=sys.stderr,
        )
        return built.returncode
    return subprocess.run(
        [sys.executable, "-c", "import rlrc.action, rlrc.msg, rlrc.srv, tf2_msgs.msg"]
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
