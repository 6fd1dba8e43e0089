"""`python -m dopfn_jax.cli` is `dopfn-jax`."""

import sys

from dopfn_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
