"""Output for people, or with --json one object on standard output and nothing else."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_reserved: TextIO | None = None


@contextmanager
def reserved_stdout() -> Iterator[None]:
    """Meanwhile standard output belongs to `emit`: what anything else prints goes to stderr.

    That holds for libraries in C and for child processes too.
    """
    global _reserved
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as _reserved:
        os.dup2(2, 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(_reserved.fileno(), 1)
            _reserved = None


def emit(arguments: argparse.Namespace, data: Any, text: str) -> None:
    """Print `data` as JSON if --json was given, else `text`."""
    if arguments.json:
        print(json.dumps(_finite(data), allow_nan=False), file=_reserved or sys.stdout, flush=True)
    else:
        print(text, flush=True)


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
