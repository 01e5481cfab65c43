"""``python -m cupy_nsa_meta``: is it installed right, does it compute right, what does it compute.

Exit status: 0 fine; 1 something does not work; 2 bad options. ``cli/`` holds the subcommands.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import cupy_nsa_meta

from .cli import FAILED

COMMANDS = {
    "doctor": "what works here, what does not, why, and what to do",
    "selftest": "run every function on this machine and compare it with its definition",
    "demo": "draw the expansion and the clamp of a small batch",
}
BENCH_HELP = "run bench.py of the checkout with the arguments that follow"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="cupy_nsa_meta",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=cupy_nsa_meta.__version__)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        module = importlib.import_module(f"cupy_nsa_meta.cli.{name}")
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="one JSON document, no text")
        command.set_defaults(run=module.run)
    commands.add_parser("bench", help=BENCH_HELP, add_help=False)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:  # all that follows is bench.py's, --help too
        from .cli import bench

        return bench.run(arguments[1:])
    args = parser().parse_args(arguments)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("cupy_nsa_meta: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return status


if __name__ == "__main__":
    sys.exit(main())
