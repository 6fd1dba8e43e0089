import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopfn_jax.config import PriorConfig
from dopfn_jax.evaluation.truth import exact_cid
from dopfn_jax.scm import SCM, true_cid
from dopfn_jax.scm.case_studies import CASE_STUDIES
from dopfn_jax.scm.mechanisms import MECHANISM_NAMES
from dopfn_jax.scm.structure import SCM as ArraySCM


def arrays(nodes, weights, mechanisms, scales, threshold=0.0, families=None):
    """An array SCM over named nodes in topological order; "t" is thresholded."""
    size = len(nodes)
    matrix = np.zeros((size, size), np.float32)
    for (parent, child), weight in weights.items():
        matrix[nodes.index(child), nodes.index(parent)] = weight
    is_t = np.array([name == "t" for name in nodes])
    return ArraySCM(
        adjacency=matrix != 0,
        weights=matrix,
        mechanism=np.array([MECHANISM_NAMES.index(name) for name in mechanisms], np.int32),
        noise_family=np.array(families or [0] * size, np.int32),
        noise_scale=np.array(scales, np.float32),
        binary=is_t,
        threshold=np.where(is_t, threshold, 0).astype(np.float32),
        active=np.ones(size, bool),
    )


def test_a_hidden_mediators_noise_is_integrated():
    """E[(w t + e)^2] = w^2 t + scale^2."""
    scm = arrays(
        ["x", "t", "m", "y"],
        {("x", "t"): 1.0, ("t", "m"): 0.8, ("m", "y"): 1.0, ("x", "y"): 0.5},
        ["identity", "identity", "identity", "square"],
        [2.0, 0.1, 0.3, 0.2],
    )
    x = np.linspace(-2, 2, 5)[:, None]
    answer = exact_cid(scm, 1, 3, [0], x)
    for arm, cid in enumerate((answer.cid0, answer.cid1)):
        expected = (0.5 * x[:, 0] + 0.8 * arm) ** 2 + 0.3**2
        np.testing.assert_allclose(cid, expected, rtol=1e-6)
    assert answer.error.max() < 1e-6


def test_a_shown_mediator_tells_about_the_natural_treatment():
    """m = t + e: given m, the odds of t = 1 are those of two Gaussian densities."""
    scm = arrays(
        ["t", "m", "y"],
        {("t", "m"): 1.0, ("m", "y"): 1.0},
        ["identity", "identity", "identity"],
        [1.0, 0.5, 0.1],
    )
    m = np.array([[0.3]])
    answer = exact_cid(scm, 0, 2, [1], m)
    odds = np.exp((-0.5 * (0.3 - 1) ** 2 + 0.5 * 0.3**2) / 0.5**2)
    share = odds / (1 + odds)
    noise = 0.3 - share  # E[e | m] = m - P(t = 1 | m)
    np.testing.assert_allclose([answer.cid0[0], answer.cid1[0]], [noise, 1 + noise], rtol=1e-6)


@pytest.mark.slow
def test_agrees_with_likelihood_weighting_on_the_textbook_front_door():
    scm = SCM.from_prior(jax.random.key(3), PriorConfig(case_study="frontdoor_pearl"))
    nodes = CASE_STUDIES["frontdoor_pearl"].nodes
    drawn = scm.to_arrays()
    order = [scm.names.index(name) for name in nodes]
    assert order == sorted(order)
    m = jnp.linspace(-0.3, 0.6, 4)
    answer = exact_cid(drawn, 1, 3, [2], np.asarray(m)[:, None])
    for arm, cid in enumerate((answer.cid0, answer.cid1)):
        sampled = true_cid(scm, {"m": m}, {"t": float(arm)}, "y", jax.random.key(0), samples=20_000)
        gap = np.abs(cid - np.asarray(sampled.value))
        assert (gap < 5 * np.asarray(sampled.standard_error) + 1e-4).all()


def test_several_hidden_nodes_by_sobol_points():
    """Two hidden roots in y = u1 + u2 squared: the mean is the sum of the variances."""
    scm = arrays(
        ["u1", "u2", "t", "y"],
        {("u1", "y"): 1.0, ("u2", "y"): 1.0, ("t", "y"): 0.5},
        ["identity", "identity", "identity", "square"],
        [1.0, 2.0, 1.0, 0.1],
    )
    answer = exact_cid(scm, 2, 3, [], np.zeros((3, 0)))
    np.testing.assert_allclose(answer.cid0, 5.0, rtol=0.01)
    np.testing.assert_allclose(answer.cid1, 5.25, rtol=0.01)
    assert (np.abs(answer.cid0 - 5) < 10 * answer.error + 1e-3).all()


@pytest.mark.parametrize(("families", "columns"), [([0, 1, 0], []), ([1, 0, 0], [1])])
def test_noise_that_cannot_be_integrated_is_named(families, columns):
    scm = arrays(
        ["t", "m", "y"],
        {("t", "m"): 1.0, ("m", "y"): 1.0},
        ["identity"] * 3,
        [1.0, 0.5, 0.1],
        families=families,
    )
    with pytest.raises(ValueError, match="laplace"):
        exact_cid(scm, 0, 2, columns, np.zeros((1, len(columns))))


def test_reproduces_the_released_truths(released):
    """Released answers and ours agree to 0.1 % of the outcome's range."""
    compared = 0
    for path in sorted(released.glob("*/01.npz")):
        data = np.load(path)
        if "cid0" not in data:
            continue
        meta = json.loads(str(data["meta"]))
        nodes: list[str] = []
        while len(nodes) < len(meta["nodes"]):
            for name in meta["nodes"]:
                parents = {parent for parent, child in meta["edges"] if child == name}
                nodes += [name] if name not in nodes and parents <= set(nodes) else []
        functions = meta["functions"]
        scm = arrays(
            nodes,
            {
                (parent, child): weight
                for child, function in functions.items()
                for parent, weight in zip(function["parents"], function["w"], strict=True)
            },
            [functions.get(name, {"act": "identity"})["act"] for name in nodes],
            [meta["noise_std"] if name in functions else meta["exo_std"] for name in nodes],
        )
        treatment, outcome = (nodes.index(meta[key]) for key in ("t_key", "y_key"))
        scm.threshold[treatment] = meta["thr"]
        covariates = [nodes.index(name) for name in meta["x_keys"] if name != meta["t_key"]]
        answer = exact_cid(scm, treatment, outcome, covariates, data["x_obs"][:, 1:])
        spread = np.ptp(data["y_int"])
        assert np.abs(answer.cid0 - data["cid0"]).max() < 1e-3 * spread, path
        assert np.abs(answer.cid1 - data["cid1"]).max() < 1e-3 * spread, path
        compared += 1
    assert compared == 8
