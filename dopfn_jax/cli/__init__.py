"""The command line, `dopfn-jax`: thin over the functions that Python users call."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from dopfn_jax.cli import export, info, predict

_DESCRIPTION = """Causal effects from a table of observations, by in-context learning (Do-PFN).

Start here:
    dopfn-jax predict study.csv --treatment drug --outcome weight

`dopfn-jax COMMAND --help` explains a command and shows examples.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Ends the program with one line, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = _Parser(
        prog="dopfn-jax",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (predict, export, info):
        name = command.__name__.rpartition(".")[2]
        summary, _, _ = (command.__doc__ or "").partition("\n")
        subparser = commands.add_parser(
            name,
            help=summary,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        # Our own errors derive from these and say what to do; a traceback would hide it.
        print(f"dopfn-jax {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
