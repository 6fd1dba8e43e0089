from collections.abc import Iterator

import jax
import pytest
from flax import nnx

from dopfn_jax.checkpoints import Checkpoint
from dopfn_jax.config import Config, ModelConfig, PriorConfig
from dopfn_jax.estimators import DoPFNRegressor
from dopfn_jax.model.transformer import DoPFN
from tests.estimators.small import table


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly() -> Iterator[None]:
    """Unoptimised programs mean the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    """An untrained model, made in one compilation, whose answers differ from row to row."""
    config = Config(
        prior=PriorConfig(max_nodes=7),
        model=ModelConfig(width=16, layers=2, heads=2, features_per_token=0, buckets=16),
    )

    def build() -> DoPFN:
        model = DoPFN(config.model, rngs=nnx.Rngs(0))
        model.head.kernel[...] *= 100
        return model

    graphdef, _ = nnx.split(nnx.eval_shape(build))
    model = nnx.merge(graphdef, jax.jit(lambda: nnx.state(build()))())
    return Checkpoint("tiny", model, config, steps=0)


@pytest.fixture(scope="session")
def fitted(checkpoint: Checkpoint) -> DoPFNRegressor:
    return DoPFNRegressor(checkpoint, n_resamples=6).fit(*table())
