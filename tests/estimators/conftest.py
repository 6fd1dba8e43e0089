import pytest

from dopfn_jax.checkpoints import Checkpoint
from dopfn_jax.estimators import DoPFNRegressor
from tests.estimators.small import table


@pytest.fixture(scope="session")
def fitted(checkpoint: Checkpoint) -> DoPFNRegressor:
    return DoPFNRegressor(checkpoint, n_resamples=6).fit(*table())
