"""Tasks that are masked because nothing can be learned from them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dopfn_jax.prior import LARGEST_VALUE
from dopfn_jax.scm.mechanisms import MECHANISM_NAMES
from tests.prior.small import (
    CONTEXT,
    OBSERVATIONAL,
    as_numpy,
    draw_scms,
    floats,
    has_share,
    tables_of,
    without_noise,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def test_overflowing_tasks_are_masked_and_finite():
    # Squares of large noise and of a treatment that weighs as much, a bit larger in every task.
    size = np.logspace(1, 9, 2000, dtype=np.float32)
    enlarged = {
        "mechanism": lambda scms, _: jnp.full_like(scms.mechanism, MECHANISM_NAMES.index("square")),
        "noise_scale": lambda scms, _: size[:, None] * scms.noise_scale,
        "weights": lambda scms, roles: scms.weights.at[
            np.arange(2000), :, roles.treatment
        ].multiply(size[:, None]),
    }
    task = as_numpy(tables_of(*draw_scms(6, **enlarged)))
    assert 0.1 < task.valid.mean() < 0.7
    for name, values in floats(task).items():
        assert np.isfinite(values).all(), name
        assert (values[~task.valid] == 0).all() and np.abs(values).max() <= LARGEST_VALUE, name
        squares = np.square(values).sum(axis=tuple(range(1, values.ndim)))
        assert np.isfinite(squares).all(), name
    # Only the numbers are masked, not the shape of the table.
    assert (task.context_mask.sum(axis=1) >= CONTEXT[0]).all()


def test_an_overflow_under_the_intervention_alone_is_masked():
    # t = 1 where x < 0, and y = (x + w t)^2, so that y(1) of rows with x > 0 is never seen.
    keys, scms, roles = draw_scms(10)
    t, y = (jnp.full_like(roles.treatment, k) for k in (1, 2))
    roles = dataclasses.replace(roles, treatment=t, outcome=y)

    def valid_share(w: float) -> float:
        weights = np.zeros((7, 7), np.float32)
        weights[1, 0], weights[2, 0], weights[2, 1] = -1, 1, w
        fields = {
            "weights": weights,
            "mechanism": np.where(np.arange(7) == 2, MECHANISM_NAMES.index("square"), 0),
            "noise_scale": np.float32([5e6, 0, 0, 0, 0, 0, 0]),
            "binary": np.arange(7) == 1,
            "threshold": np.zeros(7, np.float32),
        }
        same = {
            name: jnp.tile(value, (len(keys), *[1] * value.ndim)) for name, value in fields.items()
        }
        return tables_of(keys, dataclasses.replace(scms, **same), roles).valid.mean()

    assert 3e7**2 < LARGEST_VALUE < (3e7 + 5e6) ** 2
    assert valid_share(1e7) > 0.9 and valid_share(3e7) < 0.1


def _at(node, values, new):
    return values.at[jnp.arange(len(values)), node].set(new)


def test_a_constant_outcome_is_masked():
    constant = {
        "weights": lambda scms, roles: _at(roles.outcome, scms.weights, 0.0),
        "noise_scale": lambda scms, roles: _at(roles.outcome, scms.noise_scale, 0.0),
    }
    assert not tables_of(*draw_scms(7, **constant)).valid.any()
    nearly = constant | {
        "noise_scale": lambda scms, roles: _at(roles.outcome, scms.noise_scale, 1e-3)
    }
    assert tables_of(*draw_scms(7, **nearly)).valid.mean() > 0.5


def test_a_binary_treatment_keeps_its_threshold():
    thresholds = {
        "binary": lambda scms, roles: _at(roles.treatment, scms.binary, True),
        "threshold": lambda scms, roles: _at(roles.treatment, scms.threshold, 0.0),
        "noise_scale": without_noise,
    }
    keys, scms, roles = draw_scms(8, **thresholds)
    task = as_numpy(tables_of(keys, scms, roles, OBSERVATIONAL))
    is_root = ~np.asarray(scms.adjacency)[np.arange(len(keys)), roles.treatment].any(axis=1)
    rows = task.query_mask & (task.valid & is_root)[:, None]
    # Symmetric noise is positive half of the time.
    assert has_share(task.query_t[rows] == 1, 0.5)


def test_a_context_with_one_arm_is_masked():
    one_armed = {
        "binary": lambda scms, roles: _at(roles.treatment, scms.binary, True),
        "threshold": lambda scms, roles: _at(roles.treatment, scms.threshold, jnp.inf),
    }
    assert not tables_of(*draw_scms(9, **one_armed)).valid.any()
