"""Tables: their splits and masks, and their values recomputed."""

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats

from dopfn_jax.prior import Task
from dopfn_jax.scm.mechanisms import MECHANISM_NAMES
from tests.prior.small import (
    CHANCE,
    CONTEXT,
    MECHANISMS,
    OBSERVATIONAL,
    PRIOR,
    ROWS,
    as_numpy,
    draw_scms,
    floats,
    has_share,
    looks_uniform,
    reachable,
    tables_of,
    without_noise,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.fixture(scope="module")
def tables() -> tuple[Task, Task]:
    """The same tasks with interventional and with observational queries."""
    arguments = draw_scms(1)
    return as_numpy(tables_of(*arguments)), as_numpy(tables_of(*arguments, OBSERVATIONAL))


def test_rows_are_split_at_a_uniform_place(tables):
    task = tables[0]
    low, high = CONTEXT
    context = task.context_mask.sum(axis=1)
    assert looks_uniform(context - low, high - low + 1)
    np.testing.assert_array_equal(task.context_mask, np.arange(high) < context[:, None])
    np.testing.assert_array_equal(task.query_mask, np.arange(low, ROWS) >= context[:, None])


def test_what_is_masked_is_zero(tables):
    for task in tables:
        for name, values in floats(task).items():
            rows = task.context_mask if name.startswith("context") else task.query_mask
            exists = task.valid[:, None] & rows
            if name.endswith("x"):
                exists = exists[:, :, None] & task.covariate_mask[:, None, :]
            assert (values[~exists] == 0).all(), name
            if not name.endswith("t"):
                assert (values[exists] != 0).mean() > 0.9, name


def test_treatments_are_binary_and_valid_contexts_have_both_arms(tables):
    for task in tables:
        assert np.isin(task.context_t, (0, 1)).all() and np.isin(task.query_t, (0, 1)).all()
        treated = task.context_t.sum(axis=1)[task.valid]
        assert (treated > 0).all() and (treated < task.context_mask.sum(axis=1)[task.valid]).all()
    task = tables[0]
    assert has_share(task.query_t[task.valid][task.query_mask[task.valid]] == 1, 0.5)


def test_the_threshold_is_any_observed_value_but_the_extremes(tables):
    # A threshold at the second smallest to the second largest of R values makes 2 to R - 1 of them
    # treated, each with the same chance, but a valid task has both arms in its context.
    task = tables[1]
    context = task.context_mask.sum(axis=1)[:, None]
    number = np.arange(2, ROWS)
    one_armed = scipy.special.comb(number, context) + scipy.special.comb(ROWS - number, context)
    chance = 1 - one_armed / scipy.special.comb(ROWS, context)
    assert has_share(task.valid, chance.mean())
    expected = (chance / chance.sum(axis=1, keepdims=True))[task.valid].sum(axis=0)
    treated = (task.context_t.sum(axis=1) + task.query_t.sum(axis=1))[task.valid]
    counts = np.bincount(treated.astype(int), minlength=ROWS)
    assert len(counts) == ROWS and counts[:2].sum() == 0
    assert scipy.stats.chisquare(counts[2:], expected).pvalue > CHANCE


def test_potential_outcomes_belong_to_the_observed_units(tables):
    task, observed = tables
    np.testing.assert_array_equal(task.context_y, observed.context_y)
    np.testing.assert_array_equal(task.query_x, observed.query_x)
    both = {"rtol": 1e-5, "atol": 1e-6}
    of_set = np.where(task.query_t == 1, task.y1, task.y0)
    np.testing.assert_allclose(task.query_y, of_set, **both)
    of_seen = np.where(observed.query_t == 1, observed.y1, observed.y0)
    np.testing.assert_allclose(observed.query_y, of_seen, **both)
    rows = task.query_mask & task.valid[:, None]
    np.testing.assert_array_equal(task.y0, observed.y0)
    same = task.query_t == observed.query_t
    np.testing.assert_allclose(task.query_y[same], observed.query_y[same], **both)
    assert 0.4 < same[rows].mean() < 0.6


def test_zero_effects_are_exactly_zero_and_others_are_not():
    keys, scms, roles = draw_scms(4)
    task = as_numpy(tables_of(keys, scms, roles))
    reach = reachable(np.asarray(scms.adjacency))
    zero = ~reach[np.arange(len(reach)), roles.outcome, roles.treatment]
    np.testing.assert_array_equal(task.y0[zero], task.y1[zero])
    moved = (task.y0 != task.y1).any(axis=1)[task.valid & ~zero]
    assert moved.mean() > 0.8


@pytest.fixture(scope="module")
def noiseless():
    """Tasks whose nodes are all shown and, but for the roots, functions of their parents.

    Yields (index of a task, its task and observational twin, function that propagates).
    """
    arguments = draw_scms(5, noise_scale=without_noise)
    task, observed = (as_numpy(tables_of(*arguments, prior)) for prior in (PRIOR, OBSERVATIONAL))
    scms, roles = jax.tree.map(np.asarray, arguments[1:])
    shown = roles.covariate_mask.sum(axis=1) == scms.active.sum(axis=1) - 2
    chosen = []
    for i in np.flatnonzero(shown & task.valid):
        if scms.adjacency[i, roles.outcome[i]].any() and np.abs(task.query_y[i]).max() < 1e3:
            chosen.append(i)
    return task, observed, scms, roles, chosen[:150]


def _recompute(noiseless, i: int, x: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All nodes (K, R) from the roots in `x` and a treatment; the treatment's raw value too."""
    _, _, scms, roles, _ = noiseless
    columns = roles.covariates[i][roles.covariate_mask[i]]
    z = np.zeros((len(scms.active[i]), len(t)))
    z[columns] = x[:, roles.covariate_mask[i]].T
    for k in range(scms.active[i].sum()):
        if scms.adjacency[i, k].any():
            z[k] = MECHANISMS[MECHANISM_NAMES[scms.mechanism[i, k]]](scms.weights[i, k] @ z)
        if k == roles.treatment[i]:
            raw, z[k] = z[k].copy(), t
    return z, raw


def test_observed_rows_recomputed(noiseless):
    """Children see the binary treatment, and that is 1 from some raw value on."""
    task, observed, _, roles, chosen = noiseless
    depend = 0
    for i in chosen:
        rows, queries = task.context_mask[i], task.query_mask[i]
        x = np.concatenate([task.context_x[i][rows], observed.query_x[i][queries]])
        t = np.concatenate([task.context_t[i][rows], observed.query_t[i][queries]])
        y = np.concatenate([task.context_y[i][rows], observed.query_y[i][queries]])
        z, raw = _recompute(noiseless, i, x, t)
        atol = 1e-4 * np.abs(z).max()
        mask = roles.covariate_mask[i]
        np.testing.assert_allclose(x[:, mask].T, z[roles.covariates[i][mask]], atol=atol)
        np.testing.assert_allclose(y, z[roles.outcome[i]], atol=atol)
        if raw.any():  # the treatment has parents
            assert raw[t == 1].min() > raw[t == 0].max() - atol
            depend += 1
    assert len(chosen) == 150 and depend > 20


def test_query_rows_recomputed(noiseless):
    """Covariates are those from before the intervention, the target is that after it."""
    task, observed, _, roles, chosen = noiseless
    moved = 0
    for i in chosen:
        rows = task.query_mask[i]
        x, t_seen = observed.query_x[i][rows], observed.query_t[i][rows]
        after = {}
        for name, t in {
            "query_y": task.query_t[i][rows],
            "y0": np.zeros(rows.sum()),
            "y1": np.ones(rows.sum()),
        }.items():
            after[name], _ = _recompute(noiseless, i, x, t)
            atol = 1e-4 * np.abs(after[name]).max()
            y = getattr(task, name)[i][rows]
            np.testing.assert_allclose(y, after[name][roles.outcome[i]], atol=atol)
        before, _ = _recompute(noiseless, i, x, t_seen)
        columns = roles.covariates[i][roles.covariate_mask[i]]
        shown = task.query_x[i][rows][:, roles.covariate_mask[i]].T
        np.testing.assert_allclose(shown, before[columns], atol=1e-4 * np.abs(before).max())
        moved += not np.allclose(before[columns], after["query_y"][columns])
    assert moved > 20, "too few tasks with covariates that the treatment changes"
