"""Texts of message types, for bags that can be read where the types are not installed."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from rlrc_ros.errors import UserError

_TYPE_NAME = re.compile(r"[a-zA-Z]\w*/msg/[a-zA-Z]\w*")
_SEPARATOR = "=" * 80 + "\n"
_PRIMITIVE = re.compile(r"bool|byte|char|w?string|float(32|64)|u?int(8|16|32|64)")


def message_definition(type_name: str) -> str:
    """The ros2msg text of a type followed by the types it is made of, as rosbag2 embeds it.

    Args:
        type_name: As in sensor_msgs/msg/Image.

    Raises:
        UserError: No .msg file of it, or of a type inside it, is installed.
    """
    texts: dict[str, str] = {}
    waiting = [type_name]
    while waiting:
        name = waiting.pop(0)
        if name not in texts:
            texts[name] = _read(name)
            waiting += _parts(name, texts[name])
    first, *others = texts.items()
    parts = [f"{_SEPARATOR}MSG: {name.replace('/msg/', '/')}\n{text}" for name, text in others]
    return "\n".join([first[1], *parts])


def _read(type_name: str) -> str:
    if not _TYPE_NAME.fullmatch(type_name):
        raise UserError(f"{type_name!r} is not the name of a message type")
    package, _, name = type_name.split("/")
    # The environment's own prefix holds ROS 2 that came from PyPI.
    prefixes = os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)
    for prefix in filter(None, [*prefixes, sys.prefix]):
        path = Path(prefix) / "share" / package / "msg" / f"{name}.msg"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise UserError(f"no definition of {type_name} is installed; install the package {package}")


def _parts(type_name: str, text: str) -> list[str]:
    """Names of the types of a definition's fields that are not primitive."""
    names = []
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        field = re.split(r"[\[<]", words[0])[0]
        if _PRIMITIVE.fullmatch(field):
            continue
        package, _, name = field.rpartition("/")
        names.append(f"{package.removesuffix('/msg') or type_name.split('/')[0]}/msg/{name}")
    return names
