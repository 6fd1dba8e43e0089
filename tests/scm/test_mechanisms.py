"""Mechanisms by id."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopfn_jax.scm.mechanisms import MECHANISM_NAMES, apply_mechanism

pytestmark = pytest.mark.usefixtures("strict_dtypes")

X = np.array([-2.0, -0.5, 0.0, 0.5, 2.0], np.float32)
EXPECTED = {
    "identity": X,
    "square": [4.0, 0.25, 0.0, 0.25, 4.0],
    "relu": [0.0, 0.0, 0.0, 0.5, 2.0],
    "tanh": [-0.9640276, -0.4621172, 0.0, 0.4621172, 0.9640276],
}


def test_the_ids_are_those_of_the_names():
    ids = jnp.arange(len(MECHANISM_NAMES))
    values = jax.vmap(apply_mechanism, in_axes=(0, None))(ids, X)
    assert sorted(EXPECTED) == sorted(MECHANISM_NAMES)
    for name, value in zip(MECHANISM_NAMES, values, strict=True):
        np.testing.assert_allclose(value, EXPECTED[name], rtol=1e-6, err_msg=name)
