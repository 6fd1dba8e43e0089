"""Fixtures of the training tests: the smoke preset on one device, and its compiled functions."""

from collections.abc import Iterator

import jax
import pytest

from dopfn_jax.config import Config
from dopfn_jax.sharding import make_mesh
from dopfn_jax.training.step import Trainer, TrainState


@pytest.fixture(scope="package", autouse=True)
def _compile_quickly() -> Iterator[None]:
    """Unoptimised programs mean the same and compile in a third of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def config() -> Config:
    # The very run of tests/scripts, so that the compilation cache serves both.
    return Config.load("smoke", ["training.steps=24", "training.log_every=1"])


@pytest.fixture(scope="package")
def trainer(config: Config) -> Trainer:
    return Trainer(config, make_mesh())


@pytest.fixture(scope="package")
def first_state(trainer: Trainer) -> TrainState:
    """The state before step 0; copy it before a step, which would donate it."""
    return trainer.init()
