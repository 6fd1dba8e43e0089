"""`dopfn-jax predict` for a checkout; `python scripts/predict.py --help` explains it."""

import sys

from dopfn_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
