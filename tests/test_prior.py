"""The prior's SCMs and tables: their distribution, their masks, and their values recomputed."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from dopfn_jax.config import Config, PriorConfig
from dopfn_jax.prior import LARGEST_VALUE, Task, sample_scm, sample_table, sample_task, sample_tasks
from dopfn_jax.scm.mechanisms import MECHANISM_NAMES
from dopfn_jax.scm.noise import NOISE_FAMILIES

pytestmark = pytest.mark.usefixtures("strict_dtypes")

PRIOR = PriorConfig(
    min_nodes=2,
    max_nodes=7,
    max_hidden=2,
    mechanisms=("relu", "square", "identity"),
    noise_families=("laplace", "gaussian"),
    zero_effect_share=0.2,
)
OBSERVATIONAL = dataclasses.replace(PRIOR, target="observational")
ROWS, CONTEXT = 24, (6, 16)
MECHANISMS = {"relu": lambda x: np.maximum(x, 0), "square": np.square, "identity": lambda x: x}
# Seeds are fixed, so a test with this chance to fail either always fails or never.
CHANCE = 1e-3


def _uniform(values, number: int) -> bool:
    """Whether the values look drawn uniformly from 0, ..., number - 1."""
    counts = np.bincount(values, minlength=number)
    if len(counts) > number:
        return False
    return number == 1 or scipy.stats.chisquare(counts).pvalue > CHANCE


def _drawn_from(values, distribution) -> bool:
    return scipy.stats.kstest(values, distribution.cdf).pvalue > CHANCE


def _has_share(hits, share: float) -> bool:
    return scipy.stats.binomtest(int(np.sum(hits)), len(hits), share).pvalue > CHANCE


def _reach(adjacency: np.ndarray) -> np.ndarray:
    """[b, k, l]: whether l leads to k."""
    reach = adjacency
    for _ in range(adjacency.shape[-1]):
        reach = reach | (reach[:, :, :, None] & adjacency[:, None]).any(axis=2)
    return reach


# --- SCMs and roles ---------------------------------------------------------------------------


_sample_scms = jax.jit(jax.vmap(functools.partial(sample_scm, prior=PRIOR)))


@pytest.fixture(scope="module")
def drawn() -> SimpleNamespace:
    """Many SCMs and the roles of their nodes, as NumPy arrays with the task axis first."""
    scms, roles = _sample_scms(jax.random.split(jax.random.key(0), 20_000))
    scm, roles = jax.tree.map(np.asarray, (scms, roles))
    tasks = np.arange(len(scm.active))
    reach = _reach(scm.adjacency)
    return SimpleNamespace(
        scm=scm,
        tasks=tasks,
        nodes=scm.active.sum(axis=1),
        parents=scm.adjacency.sum(axis=2),
        root=scm.active & ~scm.adjacency.any(axis=2),
        shown=roles.covariate_mask.sum(axis=1),
        treatment=roles.treatment,
        outcome=roles.outcome,
        covariates=np.where(roles.covariate_mask, roles.covariates, -1),
        zero=~reach[tasks, roles.outcome, roles.treatment],
        descendants=reach[tasks, :, roles.treatment],
    )


def test_edges_lead_forward_between_active_nodes(drawn):
    np.testing.assert_array_equal(drawn.scm.active, np.arange(7) < drawn.nodes[:, None])
    pairs = (
        drawn.scm.active[:, :, None] & drawn.scm.active[:, None, :] & np.tri(7, k=-1, dtype=bool)
    )
    assert not (drawn.scm.adjacency & ~pairs).any()
    share = drawn.scm.adjacency[drawn.nodes == 7].mean(axis=0)
    assert (share[np.tri(7, k=-1, dtype=bool)] > 0.3).all()


def test_numbers_of_nodes_hidden_and_shown(drawn):
    assert _uniform(drawn.nodes - 2, 6)
    hidden = drawn.nodes - 2 - drawn.shown
    for nodes in range(2, 8):
        most = max(0, min(PRIOR.max_hidden, nodes - 3))
        assert _uniform(hidden[drawn.nodes == nodes], most + 1)


@pytest.mark.parametrize("nodes", [3, 5, 7])
def test_numbers_of_edges(drawn, nodes):
    pairs = nodes * (nodes - 1) // 2
    for shown in range(max(1, nodes - 2 - PRIOR.max_hidden), nodes - 1):
        least = 1 / (shown + 1)
        edges = drawn.scm.adjacency[(drawn.nodes == nodes) & (drawn.shown == shown)].sum((1, 2))
        # The share of edges is Uniform(least, 1), given which their number is binomial.
        chance = [
            scipy.integrate.quad(lambda p, n=n: scipy.stats.binom.pmf(n, pairs, p), least, 1)[0]
            for n in range(pairs + 1)
        ]
        expected = len(edges) * np.array(chance) / (1 - least)
        # Bins that are too rare for chi-square are put together.
        rare = expected < 5
        observed = np.bincount(edges, minlength=pairs + 1)
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
        statistic = np.sum((observed - expected) ** 2 / np.maximum(expected, 1))
        assert scipy.stats.chi2.sf(statistic, len(observed) - 1) > CHANCE


def test_weights_are_uniform_within_the_bound_and_zero_off_edges(drawn):
    edges = drawn.scm.adjacency
    assert (drawn.scm.weights[~edges] == 0).all()
    relative = (drawn.scm.weights * np.sqrt(drawn.parents)[:, :, None])[edges]
    assert np.abs(relative).max() <= 1 + 1e-6
    assert _drawn_from(relative, scipy.stats.uniform(-1, 2))


def test_mechanisms_and_noise_families_are_uniform_over_the_configured_ones(drawn):
    for ids, names, known in (
        (drawn.scm.mechanism, PRIOR.mechanisms, MECHANISM_NAMES),
        (drawn.scm.noise_family, PRIOR.noise_families, NOISE_FAMILIES),
    ):
        configured = [known.index(name) for name in names]
        assert np.isin(ids, configured).all()
        for node in (0, 6):
            assert _uniform(np.searchsorted(np.sort(configured), ids[:, node]), len(names))
        same = ids[:, 0] == ids[:, 1]
        assert _has_share(same, 1 / len(names)), "nodes must draw independently"


def test_noise_scales(drawn):
    scale = drawn.scm.noise_scale
    assert (scale[~drawn.scm.active] == 0).all()
    # The first node is a root; all roots of a task share one scale, all others another.
    np.testing.assert_array_equal(scale[drawn.root], np.repeat(scale[:, 0], drawn.root.sum(axis=1)))
    assert _drawn_from(scale[:, 0], scipy.stats.uniform(1, 2))
    other = drawn.scm.active & ~drawn.root
    largest = np.where(other, scale, 0).max(axis=1)
    np.testing.assert_array_equal(scale[other], np.repeat(largest, other.sum(axis=1)))
    assert _drawn_from(largest[other.any(axis=1)] / 0.3, scipy.stats.beta(1, 5))


def test_the_outcome_descends_from_the_treatment_but_for_the_zero_effect_share(drawn):
    assert drawn.scm.active[drawn.tasks, drawn.treatment].all()
    assert drawn.scm.active[drawn.tasks, drawn.outcome].all()
    assert (drawn.treatment != drawn.outcome).all()
    has_edge = drawn.scm.adjacency.any(axis=(1, 2))
    assert drawn.zero[~has_edge].all() and (~has_edge).any()
    assert _has_share(drawn.zero[has_edge], PRIOR.zero_effect_share)


def test_treatment_and_outcome_are_uniform_over_their_candidates(drawn):
    has_child = drawn.scm.adjacency.any(axis=1)
    for chosen, candidates in (
        (drawn.treatment, has_child),
        (drawn.outcome, drawn.descendants),
    ):
        rank = (candidates & (np.arange(7) < chosen[:, None])).sum(axis=1)
        for number in (2, 3):
            assert _uniform(rank[~drawn.zero & (candidates.sum(axis=1) == number)], number)


def test_covariates_are_other_nodes_in_random_order(drawn):
    is_column = drawn.covariates >= 0
    ordered = np.sort(drawn.covariates, axis=1)
    assert (np.diff(ordered)[ordered[:, 1:] >= 0] > 0).all(), "no node is shown twice"
    assert drawn.scm.active[drawn.tasks[:, None], drawn.covariates][is_column].all()
    assert not (drawn.covariates == drawn.treatment[:, None]).any()
    assert not (drawn.covariates == drawn.outcome[:, None]).any()
    # Of five candidates, three are shown: any of them, in any order.
    three = drawn.covariates[(drawn.nodes == 7) & (drawn.shown == 3)][:, :3]
    candidates = np.ones((len(three), 7), bool)
    for role in (drawn.treatment, drawn.outcome):
        candidates[np.arange(len(three)), role[(drawn.nodes == 7) & (drawn.shown == 3)]] = False
    rank = np.cumsum(candidates, axis=1)[np.arange(len(three))[:, None], three] - 1
    codes = rank @ np.array([25, 5, 1])
    assert _uniform(np.unique(codes, return_inverse=True)[1], 5 * 4 * 3)


def test_every_task_has_an_scm_of_its_own(drawn):
    graphs = drawn.scm.adjacency[drawn.nodes == 7]
    assert len(np.unique(graphs, axis=0)) > 0.8 * len(graphs)
    assert len(np.unique(drawn.scm.noise_scale[:, 0])) > 0.98 * len(drawn.tasks)


# --- Tables -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=3)
def _tables(keys, scms, roles, prior=PRIOR) -> Task:
    def table(key, scm, roles):
        return sample_table(key, scm, roles, prior, ROWS, CONTEXT, potential_outcomes=True)

    return jax.vmap(table)(keys, scms, roles)


def _draw(seed: int, **changes):
    """Keys, SCMs and roles of 2000 tasks; `changes` are functions of (SCMs, roles), by field."""
    keys = jax.random.split(jax.random.key(seed), (2, 2000))
    scms, roles = _sample_scms(keys[0])
    changed = {name: jnp.asarray(change(scms, roles)) for name, change in changes.items()}
    return keys[1], dataclasses.replace(scms, **changed), roles


def _numpy(task: Task) -> Task:
    return jax.tree.map(np.asarray, task)


def _no_noise(scms, roles):
    """Noise at the roots alone, so that all other nodes are functions of their parents."""
    return jnp.where(scms.adjacency.any(axis=2), 0.0, scms.noise_scale)


@pytest.fixture(scope="module")
def tables() -> tuple[Task, Task]:
    """The same tasks with interventional and with observational queries."""
    arguments = _draw(1)
    return _numpy(_tables(*arguments)), _numpy(_tables(*arguments, OBSERVATIONAL))


def _floats(task: Task) -> dict[str, np.ndarray]:
    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    return {
        name: np.asarray(value)
        for name, value in fields.items()
        if value is not None and value.dtype == np.float32
    }


def test_rows_are_split_at_a_uniform_place(tables):
    task = tables[0]
    low, high = CONTEXT
    context = task.context_mask.sum(axis=1)
    assert _uniform(context - low, high - low + 1)
    np.testing.assert_array_equal(task.context_mask, np.arange(high) < context[:, None])
    np.testing.assert_array_equal(task.query_mask, np.arange(low, ROWS) >= context[:, None])


def test_what_is_masked_is_zero(tables):
    for task in tables:
        for name, values in _floats(task).items():
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
    assert _has_share(task.query_t[task.valid][task.query_mask[task.valid]] == 1, 0.5)


def test_the_threshold_is_any_observed_value_but_the_extremes(tables):
    # A threshold at the second smallest to the second largest of R values makes 2 to R - 1 of them
    # treated, each with the same chance, but a valid task has both arms in its context.
    task = tables[1]
    context = task.context_mask.sum(axis=1)[:, None]
    number = np.arange(2, ROWS)
    one_armed = scipy.special.comb(number, context) + scipy.special.comb(ROWS - number, context)
    chance = 1 - one_armed / scipy.special.comb(ROWS, context)
    assert _has_share(task.valid, chance.mean())
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
    keys, scms, roles = _draw(4)
    task = _numpy(_tables(keys, scms, roles))
    reach = _reach(np.asarray(scms.adjacency))
    zero = ~reach[np.arange(len(reach)), roles.outcome, roles.treatment]
    np.testing.assert_array_equal(task.y0[zero], task.y1[zero])
    moved = (task.y0 != task.y1).any(axis=1)[task.valid & ~zero]
    assert moved.mean() > 0.8


@pytest.fixture(scope="module")
def noiseless():
    """Tasks whose nodes are all shown and, but for the roots, functions of their parents.

    Yields (index of a task, its task and observational twin, function that propagates).
    """
    arguments = _draw(5, noise_scale=_no_noise)
    task, observed = (_numpy(_tables(*arguments, prior)) for prior in (PRIOR, OBSERVATIONAL))
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


# --- Degenerate tasks -------------------------------------------------------------------------


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
    task = _numpy(_tables(*_draw(6, **enlarged)))
    assert 0.1 < task.valid.mean() < 0.7
    for name, values in _floats(task).items():
        assert np.isfinite(values).all(), name
        assert (values[~task.valid] == 0).all() and np.abs(values).max() <= LARGEST_VALUE, name
        squares = np.square(values).sum(axis=tuple(range(1, values.ndim)))
        assert np.isfinite(squares).all(), name
    # Only the numbers are masked, not the shape of the table.
    assert (task.context_mask.sum(axis=1) >= CONTEXT[0]).all()


def test_an_overflow_under_the_intervention_alone_is_masked():
    # t = 1 where x < 0, and y = (x + w t)^2, so that y(1) of rows with x > 0 is never seen.
    keys, scms, roles = _draw(10)
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
        return _tables(keys, dataclasses.replace(scms, **same), roles).valid.mean()

    assert 3e7**2 < LARGEST_VALUE < (3e7 + 5e6) ** 2
    assert valid_share(1e7) > 0.9 and valid_share(3e7) < 0.1


def _at(node, values, new):
    return values.at[jnp.arange(len(values)), node].set(new)


def test_a_constant_outcome_is_masked():
    constant = {
        "weights": lambda scms, roles: _at(roles.outcome, scms.weights, 0.0),
        "noise_scale": lambda scms, roles: _at(roles.outcome, scms.noise_scale, 0.0),
    }
    assert not _tables(*_draw(7, **constant)).valid.any()
    nearly = constant | {
        "noise_scale": lambda scms, roles: _at(roles.outcome, scms.noise_scale, 1e-3)
    }
    assert _tables(*_draw(7, **nearly)).valid.mean() > 0.5


def test_a_binary_treatment_keeps_its_threshold():
    thresholds = {
        "binary": lambda scms, roles: _at(roles.treatment, scms.binary, True),
        "threshold": lambda scms, roles: _at(roles.treatment, scms.threshold, 0.0),
        "noise_scale": _no_noise,
    }
    keys, scms, roles = _draw(8, **thresholds)
    task = _numpy(_tables(keys, scms, roles, OBSERVATIONAL))
    is_root = ~np.asarray(scms.adjacency)[np.arange(len(keys)), roles.treatment].any(axis=1)
    rows = task.query_mask & (task.valid & is_root)[:, None]
    # Symmetric noise is positive half of the time.
    assert _has_share(task.query_t[rows] == 1, 0.5)


def test_a_context_with_one_arm_is_masked():
    one_armed = {
        "binary": lambda scms, roles: _at(roles.treatment, scms.binary, True),
        "threshold": lambda scms, roles: _at(roles.treatment, scms.threshold, jnp.inf),
    }
    assert not _tables(*_draw(9, **one_armed)).valid.any()


# --- Whole tasks ------------------------------------------------------------------------------


PRESET = (Config.load("do_pfn").prior, 256, (10, 255))
_preset_tasks = jax.jit(lambda keys: sample_tasks(keys, *PRESET))
_preset_task = jax.jit(lambda key: sample_task(key, *PRESET))


@pytest.fixture(scope="module")
def preset_tasks() -> tuple[jax.Array, Task]:
    keys = jax.random.split(jax.random.key(10), 500)
    return keys, _numpy(_preset_tasks(keys))


def test_few_tasks_of_the_preset_are_degenerate(preset_tasks):
    _, task = preset_tasks
    assert 0.9 < task.valid.mean() < 1
    assert all(np.isfinite(values).all() for values in _floats(task).values())


def test_a_task_is_a_function_of_its_key(preset_tasks):
    keys, task = preset_tasks
    for i in range(3):
        alone = _preset_task(keys[i])
        for name, value in _floats(alone).items():
            np.testing.assert_allclose(
                value, getattr(task, name)[i], rtol=1e-4, atol=1e-5, err_msg=name
            )
        np.testing.assert_array_equal(alone.context_mask, task.context_mask[i])
        np.testing.assert_array_equal(alone.covariate_mask, task.covariate_mask[i])
    again = _preset_tasks(keys)
    jax.tree.map(np.testing.assert_array_equal, _numpy(again), task)
    assert len(np.unique(task.context_y[task.valid][:, 0])) > 0.98 * task.valid.sum()


def test_the_smallest_prior_has_tables_without_covariates():
    prior = PriorConfig(min_nodes=2, max_nodes=2)
    task = jax.eval_shape(lambda key: sample_task(key, prior, 20, (5, 12)), jax.random.key(0))
    assert task.context_x.shape == (12, 0) and task.query_x.shape == (15, 0)
    assert task.y0 is None and task.y1 is None
