"""`dopfn-jax evaluate` for a checkout; `python scripts/evaluate.py --help` explains it."""

import sys
from collections.abc import Sequence

from dopfn_jax.cli import main as command_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return command_line(["evaluate", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
