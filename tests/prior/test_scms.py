"""SCMs and the roles of their nodes: their distribution."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from dopfn_jax.scm.mechanisms import MECHANISM_NAMES
from dopfn_jax.scm.noise import NOISE_FAMILIES
from tests.prior.small import (
    CHANCE,
    PRIOR,
    has_share,
    looks_drawn_from,
    looks_uniform,
    reachable,
    sample_scms,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.fixture(scope="module")
def drawn() -> SimpleNamespace:
    """Many SCMs and the roles of their nodes, as NumPy arrays with the task axis first."""
    scms, roles = sample_scms(jax.random.split(jax.random.key(0), 20_000))
    scm, roles = jax.tree.map(np.asarray, (scms, roles))
    tasks = np.arange(len(scm.active))
    reach = reachable(scm.adjacency)
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
    assert looks_uniform(drawn.nodes - 2, 6)
    hidden = drawn.nodes - 2 - drawn.shown
    for nodes in range(2, 8):
        most = max(0, min(PRIOR.max_hidden, nodes - 3))
        assert looks_uniform(hidden[drawn.nodes == nodes], most + 1)


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
    assert looks_drawn_from(relative, scipy.stats.uniform(-1, 2))


def test_mechanisms_and_noise_families_are_uniform_over_the_configured_ones(drawn):
    for ids, names, known in (
        (drawn.scm.mechanism, PRIOR.mechanisms, MECHANISM_NAMES),
        (drawn.scm.noise_family, PRIOR.noise_families, NOISE_FAMILIES),
    ):
        configured = [known.index(name) for name in names]
        assert np.isin(ids, configured).all()
        for node in (0, 6):
            assert looks_uniform(np.searchsorted(np.sort(configured), ids[:, node]), len(names))
        same = ids[:, 0] == ids[:, 1]
        assert has_share(same, 1 / len(names)), "nodes must draw independently"


def test_noise_scales(drawn):
    scale = drawn.scm.noise_scale
    assert (scale[~drawn.scm.active] == 0).all()
    # The first node is a root; all roots of a task share one scale, all others another.
    np.testing.assert_array_equal(scale[drawn.root], np.repeat(scale[:, 0], drawn.root.sum(axis=1)))
    assert looks_drawn_from(scale[:, 0], scipy.stats.uniform(1, 2))
    other = drawn.scm.active & ~drawn.root
    largest = np.where(other, scale, 0).max(axis=1)
    np.testing.assert_array_equal(scale[other], np.repeat(largest, other.sum(axis=1)))
    assert looks_drawn_from(largest[other.any(axis=1)] / 0.3, scipy.stats.beta(1, 5))


def test_the_outcome_descends_from_the_treatment_but_for_the_zero_effect_share(drawn):
    assert drawn.scm.active[drawn.tasks, drawn.treatment].all()
    assert drawn.scm.active[drawn.tasks, drawn.outcome].all()
    assert (drawn.treatment != drawn.outcome).all()
    has_edge = drawn.scm.adjacency.any(axis=(1, 2))
    assert drawn.zero[~has_edge].all() and (~has_edge).any()
    assert has_share(drawn.zero[has_edge], PRIOR.zero_effect_share)


def test_treatment_and_outcome_are_uniform_over_their_candidates(drawn):
    has_child = drawn.scm.adjacency.any(axis=1)
    for chosen, candidates in (
        (drawn.treatment, has_child),
        (drawn.outcome, drawn.descendants),
    ):
        rank = (candidates & (np.arange(7) < chosen[:, None])).sum(axis=1)
        for number in (2, 3):
            assert looks_uniform(rank[~drawn.zero & (candidates.sum(axis=1) == number)], number)


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
    assert looks_uniform(np.unique(codes, return_inverse=True)[1], 5 * 4 * 3)


def test_every_task_has_an_scm_of_its_own(drawn):
    graphs = drawn.scm.adjacency[drawn.nodes == 7]
    assert len(np.unique(graphs, axis=0)) > 0.8 * len(graphs)
    assert len(np.unique(drawn.scm.noise_scale[:, 0])) > 0.98 * len(drawn.tasks)
