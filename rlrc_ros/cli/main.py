"""The command `rlrc`: finds the verb, parses, and turns mistakes into one line.

A verb is a module of this package with HELP, add_arguments(parser) and main(arguments), which
returns the exit status. What is slow to import, a verb imports in its main.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from rlrc_ros.cli.output import reserve_stdout
from rlrc_ros.errors import UserError

VERBS = ("demo", "inspect", "compress", "sft", "prune", "rl", "quantize", "eval", "bench", "bag")

EXTRAS = {
    "sim": {"mujoco", "gymnasium"},
    "train": {"training", "stable_baselines3", "torch_pruning", "tqdm"},
    "ros": {"rclpy", "sensor_msgs", "geometry_msgs", "std_srvs", "diagnostic_msgs"},
}


def main(argv: list[str] | None = None) -> int:
    """Run one command line.

    Returns the exit status: 0, or 1 for a negative finding, or 2 for a mistake.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="rlrc", description="Compress vision-language-action policies, run and compare them."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    wanted = [argv[0]] if argv and argv[0] in VERBS else VERBS
    for name in wanted:
        module = importlib.import_module(f"rlrc_ros.cli.{name}")
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(verb)
        for leaf in _leaves(verb):
            leaf.add_argument(
                "--json", action="store_true", help="print one JSON object and nothing else"
            )
            leaf.set_defaults(run=module.main)
    arguments = parser.parse_args(argv)
    if arguments.json:
        reserve_stdout()
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"rlrc {arguments.verb}: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = next((extra for extra, names in EXTRAS.items() if missing in names), None)
        if extra is None:
            raise
        hint = f"pip install -e '.[{extra}]' in a checkout of this project"
        print(
            f"rlrc {arguments.verb}: needs '{missing}', which is not installed; {hint}",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print(f"rlrc {arguments.verb}: interrupted", file=sys.stderr)
        return 130
    return 2


def _leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of a verb's own subcommands, or the verb's parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return list(action.choices.values())
    return [parser]


if __name__ == "__main__":
    sys.exit(main())
