"""Types of command line arguments that several verbs take."""

from __future__ import annotations

import argparse
from collections.abc import Callable

LAST_SEED = 2**32 - 1
"""The largest seed that NumPy's global generator takes."""


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number in these bounds, both included."""
    bounds = f"from {least} up" if most is None else f"from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")
        return value

    return parse


seed = whole_number(0, LAST_SEED)
