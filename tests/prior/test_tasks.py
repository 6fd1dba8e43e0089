"""Whole tasks, from a key to a table."""

import jax
import numpy as np
import pytest

from dopfn_jax.config import Config, PriorConfig
from dopfn_jax.prior import Task, sample_task, sample_tasks
from tests.prior.small import as_numpy, floats

pytestmark = pytest.mark.usefixtures("strict_dtypes")


PRESET = (Config.load("do_pfn").prior, 256, (10, 255))
_preset_tasks = jax.jit(lambda keys: sample_tasks(keys, *PRESET))
_preset_task = jax.jit(lambda key: sample_task(key, *PRESET))


@pytest.fixture(scope="module")
def preset_tasks() -> tuple[jax.Array, Task]:
    keys = jax.random.split(jax.random.key(10), 500)
    return keys, as_numpy(_preset_tasks(keys))


def test_few_tasks_of_the_preset_are_degenerate(preset_tasks):
    _, task = preset_tasks
    assert 0.9 < task.valid.mean() < 1
    assert all(np.isfinite(values).all() for values in floats(task).values())


def test_a_task_is_a_function_of_its_key(preset_tasks):
    keys, task = preset_tasks
    for i in range(3):
        alone = _preset_task(keys[i])
        for name, value in floats(alone).items():
            np.testing.assert_allclose(
                value, getattr(task, name)[i], rtol=1e-4, atol=1e-5, err_msg=name
            )
        np.testing.assert_array_equal(alone.context_mask, task.context_mask[i])
        np.testing.assert_array_equal(alone.covariate_mask, task.covariate_mask[i])
    again = _preset_tasks(keys)
    jax.tree.map(np.testing.assert_array_equal, as_numpy(again), task)
    assert len(np.unique(task.context_y[task.valid][:, 0])) > 0.98 * task.valid.sum()


def test_groups_draw_the_same_tasks(preset_tasks):
    keys, task = preset_tasks
    in_groups = jax.jit(lambda keys: sample_tasks(keys, *PRESET, at_once=16))(keys[:40])
    for name, value in floats(in_groups).items():
        expected = getattr(task, name)[:40]
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_smallest_prior_has_tables_without_covariates():
    prior = PriorConfig(min_nodes=2, max_nodes=2)
    task = jax.eval_shape(lambda key: sample_task(key, prior, 20, (5, 12)), jax.random.key(0))
    assert task.context_x.shape == (12, 0) and task.query_x.shape == (15, 0)
    assert task.y0 is None and task.y1 is None
