"""Strict mode for every test, and settings that keep compilation and threads cheap."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

# The first example compiles, which no deadline allows for. Fixed examples keep CI stable.
hypothesis.settings.register_profile("jax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jax")


def pytest_configure(config: pytest.Config) -> None:
    # As environment variables, because JAX and BLAS read them when they load, and because the
    # processes that tests start inherit them.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    # BLAS threads spin while they wait, so xdist workers share out the cores; XLA's sleep.
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        threads = max(1, (os.cpu_count() or 1) // int(workers))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))

    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def strict_dtypes() -> Iterator[None]:
    """Implicit dtype promotion raises.

    Not the default, because Optax's bias correction raises a float to an integer count.
    """
    import jax

    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def checking_leaks() -> Iterator[None]:
    """Leaked tracers raise. Not the default, because it makes JAX trace everything anew."""
    import jax

    with jax.checking_leaks():
        yield
