"""Strict mode for every test, settings that keep compilation and threads cheap, a tiny model."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from dopfn_jax.checkpoints import Checkpoint

# The first example compiles, which no deadline allows for. Fixed examples keep CI stable.
hypothesis.settings.register_profile("jax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jax")


def pytest_configure(config: pytest.Config) -> None:
    # As environment variables, because JAX and BLAS read them when they load, and because the
    # processes that tests start inherit them.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    # Unoptimised programs mean the same and compile in a third of the time.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
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


@pytest.fixture(scope="module")
def optimise() -> Iterator[None]:
    """For modules that compute for longer than they compile."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def checkpoint() -> "Checkpoint":
    """An untrained model, made in one compilation, whose answers differ from row to row."""
    import jax
    from flax import nnx

    from dopfn_jax.checkpoints import Checkpoint
    from dopfn_jax.config import Config, ModelConfig, PriorConfig
    from dopfn_jax.model.transformer import DoPFN

    config = Config(
        prior=PriorConfig(max_nodes=7),
        model=ModelConfig(
            width=16, layers=2, heads=2, features_per_token=0, linear_fit=True, buckets=16
        ),
    )

    def build() -> DoPFN:
        model = DoPFN(config.model, rngs=nnx.Rngs(0))
        model.head.kernel[...] *= 100
        return model

    graphdef, _ = nnx.split(nnx.eval_shape(build))
    model = nnx.merge(graphdef, jax.jit(lambda: nnx.state(build()))())
    return Checkpoint("tiny", model, config, steps=0)


@pytest.fixture(scope="session")
def checkpoint_folder(checkpoint: "Checkpoint", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, saved."""
    from dopfn_jax.checkpoints import save_checkpoint

    folder = tmp_path_factory.mktemp("weights")
    save_checkpoint(folder, checkpoint.model, checkpoint.config, steps=0)
    return folder
