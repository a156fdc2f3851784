"""Output for people, or with --json one object on standard output and nothing else."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any, TextIO

_reserved: TextIO | None = None


def reserve_stdout() -> None:
    """From here on standard output belongs to `emit`: what anything else prints goes to stderr."""
    global _reserved
    sys.stdout.flush()
    _reserved = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def emit(arguments: argparse.Namespace, data: Any, text: str) -> None:
    """Print `data` as JSON if --json was given, else `text`."""
    if arguments.json:
        print(json.dumps(data), file=_reserved or sys.stdout, flush=True)
    else:
        print(text)
