"""Fixtures of the training tests: the smoke preset on one device, and its compiled functions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dopfn_jax.config import Config
from dopfn_jax.sharding import make_mesh
from dopfn_jax.training.step import Trainer, TrainState


@pytest.fixture(scope="session")
def config() -> Config:
    # The very run of tests/scripts, so that the compilation cache serves both.
    return Config.load("smoke", ["training.steps=24", "training.log_every=1"])


@pytest.fixture(scope="package")
def trainer(config: Config) -> Trainer:
    return Trainer(config, make_mesh())


@pytest.fixture(scope="package")
def first_state(trainer: Trainer) -> TrainState:
    """The state before step 0; a step would donate it, so give it a copy from `fresh`."""
    return trainer.init()


@pytest.fixture(scope="package")
def fresh(trainer: Trainer, first_state: TrainState) -> Callable[..., TrainState]:
    """Copies of the first state, with some fields replaced."""
    copy = jax.jit(lambda s: jax.tree.map(jnp.copy, s), out_shardings=trainer.shardings)

    def make(**changes: Any) -> TrainState:
        state = dataclasses.replace(first_state, **changes)
        return copy(jax.device_put(state, trainer.shardings))

    return make
