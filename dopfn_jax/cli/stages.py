"""Says what a command is busy with, where no bar could: one compilation may take half a minute."""

import sys


def say(stage: str) -> None:
    """Prints a line to the terminal; nothing where standard error is none."""
    if sys.stderr.isatty():
        print(f"{stage} ...", file=sys.stderr)
