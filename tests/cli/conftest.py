from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from flax import nnx

from dopfn_jax.checkpoints import save_checkpoint
from dopfn_jax.config import Config, ModelConfig, PriorConfig
from dopfn_jax.model.transformer import DoPFN


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly() -> Iterator[None]:
    """Unoptimised programs mean the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained model, made in one compilation."""
    config = Config(
        prior=PriorConfig(max_nodes=6),
        model=ModelConfig(width=16, layers=2, heads=2, features_per_token=0, buckets=16),
    )

    def build() -> DoPFN:
        model = DoPFN(config.model, rngs=nnx.Rngs(0))
        model.head.kernel[...] *= 100
        return model

    graphdef, _ = nnx.split(nnx.eval_shape(build))
    model = nnx.merge(graphdef, jax.jit(lambda: nnx.state(build()))())
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoint(folder, model, config, steps=0)
    return folder
