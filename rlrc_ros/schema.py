"""Dataclasses from JSON and YAML, strictly.

Every mistake in a file is one line that says where it is.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from pathlib import Path
from typing import Any, TypeVar

import dacite
import yaml

from rlrc_ros.errors import UserError

T = TypeVar("T")


def from_dict(cls: type[T], data: Any, where: str) -> T:
    """Build the dataclass `cls` from nested dictionaries; errors name the file `where`.

    Raises:
        UserError: an unknown or missing key, a value of the wrong type, or one that `__post_init__`
            refuses.
    """
    _refuse_unknown_keys(cls, data, where)
    try:
        return dacite.from_dict(cls, data, _CONFIG)
    except dacite.MissingValueError as error:
        raise UserError(f"{where}: '{error.field_path}' is missing") from None
    except (dacite.DaciteError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def _number(value: Any) -> Any:
    """An int where a float is asked for is fine; a bool or a string is not."""
    return float(value) if type(value) is int else value


_CONFIG = dacite.Config(cast=[tuple], type_hooks={float: _number})


def _refuse_unknown_keys(hint: Any, data: Any, where: str, path: str = "") -> None:
    """Refuse keys that no field of the dataclasses in the type `hint` is named after.

    And true and false where a number belongs.
    """
    arguments = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(data, dict):
            place = f" at '{path}'" if path else ""
            found = type(data).__name__
            raise UserError(f"{where}: expected keys and values{place}, found {found}")
        hints = typing.get_type_hints(hint)
        known = [field.name for field in dataclasses.fields(hint)]
        for key, value in data.items():
            full = f"{path}.{key}" if path else str(key)
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                near = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
                raise UserError(f"{where}: unknown key '{full}'; {near}")
            _refuse_unknown_keys(hints[key], value, where, full)
    elif typing.get_origin(hint) is dict and isinstance(data, dict):
        for key, value in data.items():
            _refuse_unknown_keys(arguments[1], value, where, f"{path}.{key}")
    elif isinstance(data, list):
        for i, value in enumerate(data):
            _refuse_unknown_keys(arguments[0] if arguments else None, value, where, f"{path}[{i}]")
    elif hint in (int, float) and isinstance(data, bool):  # which Python takes for a number
        raise UserError(f"{where}: '{path}' must be a number, found {str(data).lower()}")
    elif data is not None:
        for inner in arguments:  # of a union
            if dataclasses.is_dataclass(inner):
                _refuse_unknown_keys(inner, data, where, path)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: the file is missing, unreadable, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None


def read_yaml(path: Path) -> Any:
    """The content of a YAML file of plain data.

    Raises:
        UserError: the file is missing, unreadable, or no YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "malformed"
        raise UserError(f"{path}{line}: not valid YAML ({problem})") from None
