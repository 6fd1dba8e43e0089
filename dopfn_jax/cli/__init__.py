"""The command line, `dopfn-jax`: thin over the functions that Python users call."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from dopfn_jax.cli import evaluate, export, info, predict, train

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
    for command in (predict, train, evaluate, export, info):
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
        subparser.set_defaults(command=name, run=command.run)
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] in commands.choices:
        # Its own parser lets options and other words come in any order, which a subparser cannot.
        options = commands.choices[words[0]].parse_intermixed_args(words[1:])
    else:
        options = parser.parse_args(words)  # help, or a mistake
    try:
        options.run(options)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if not _explains_itself(error):
            raise
        print(f"dopfn-jax {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(": ".join([f"dopfn-jax {options.command}", "stopped", *stop.args]), file=sys.stderr)
        return 130
    return 0


def _explains_itself(error: Exception) -> bool:
    """Whether the message says what to do, so that a traceback would only hide it.

    True of what our own code raises, of files and of missing packages; an error from deep inside of
    a library needs its traceback.
    """
    if isinstance(error, OSError | ImportError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).startswith("dopfn_jax.")
