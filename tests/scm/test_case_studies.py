"""The graphs of the paper's case studies, and what they give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopfn_jax.config import PriorConfig
from dopfn_jax.prior import sample_scm, sample_tasks
from dopfn_jax.scm.case_studies import CASE_STUDIES
from dopfn_jax.scm.mechanisms import MECHANISM_NAMES
from dopfn_jax.scm.propagate import propagate

# Table 1 of the paper, in the form of its released data.
EDGES = {
    "observed_confounder": "x1->t, x1->y, t->y",
    "observed_mediator": "t->x1, x1->y, t->y",
    "confounder_mediator": "x2->t, x2->y, t->x1, x1->y, t->y",
    "unobserved_confounder": "x1->t, x1->y, x2->t, x2->y, t->y",
    "backdoor": "x1->t, x1->y, t->m, m->y",
    "frontdoor": "x1->t, x1->y, t->m, m->y",
    "frontdoor_pearl": "u->t, u->y, t->m, m->y",
    "common_effect": "t->y, x1->y",
}
SHOWN = dict.fromkeys(EDGES, ("x1",)) | {
    "confounder_mediator": ("x1", "x2"),
    "frontdoor_pearl": ("m",),
}
# The outcome as a function f(node, {parent: value}) of noises e and a treatment that is set.
OUTCOMES = {
    "observed_confounder": lambda f, e, t: f("y", x1=e["x1"], t=t),
    "observed_mediator": lambda f, e, t: f("y", x1=f("x1", t=t), t=t),
    "confounder_mediator": lambda f, e, t: f("y", x1=f("x1", t=t), x2=e["x2"], t=t),
    "unobserved_confounder": lambda f, e, t: f("y", x1=e["x1"], x2=e["x2"], t=t),
    "backdoor": lambda f, e, t: f("y", x1=e["x1"], m=f("m", t=t)),
    "frontdoor": lambda f, e, t: f("y", x1=e["x1"], m=f("m", t=t)),
    "frontdoor_pearl": lambda f, e, t: f("y", u=e["u"], m=f("m", t=t)),
    "common_effect": lambda f, e, t: f("y", x1=e["x1"], t=t),
}
NONLINEARITIES = {
    "identity": lambda x: x,
    "square": np.square,
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
}
every_study = pytest.mark.parametrize("name", sorted(EDGES))


def test_the_studies_are_those_of_the_paper():
    assert sorted(CASE_STUDIES) == sorted(EDGES)


@every_study
def test_graph_and_shown_columns(name):
    nodes = CASE_STUDIES[name].nodes
    scm, roles = sample_scm(jax.random.key(0), PriorConfig(case_study=name))
    children, parents = np.nonzero(scm.adjacency)
    assert (children > parents).all() and scm.active.all() and roles.covariate_mask.all()
    pairs = zip(children, parents, strict=True)
    assert {f"{nodes[parent]}->{nodes[child]}" for child, parent in pairs} == set(
        EDGES[name].split(", ")
    )
    assert (nodes[roles.treatment], nodes[roles.outcome]) == ("t", "y")
    assert tuple(nodes[k] for k in roles.covariates) == SHOWN[name]


@every_study
def test_potential_outcomes(name):
    nodes = CASE_STUDIES[name].nodes
    scm, roles = sample_scm(jax.random.key(1), PriorConfig(case_study=name))
    noise = np.random.default_rng(0).normal(size=(len(nodes), 5)).astype(np.float32)
    e = dict(zip(nodes, noise, strict=True))
    weights = np.asarray(scm.weights)

    def f(node, **parents):
        k = nodes.index(node)
        total = sum(weights[k, nodes.index(parent)] * value for parent, value in parents.items())
        return NONLINEARITIES[MECHANISM_NAMES[scm.mechanism[k]]](total) + e[node]

    for t in np.array([[0.0], [1.0]], np.float32).repeat(5, axis=1):
        y = propagate(scm, jnp.asarray(noise), (roles.treatment, t))[roles.outcome]
        np.testing.assert_allclose(y, OUTCOMES[name](f, e, t), rtol=1e-5, atol=1e-6)


@every_study
def test_a_table_shows_the_studys_columns(name):
    prior = PriorConfig(case_study=name)
    keys = jax.random.split(jax.random.key(0), 3)
    task = jax.eval_shape(lambda keys: sample_tasks(keys, prior, 20, (5, 12)), keys)
    assert task.context_x.shape == (3, 12, len(SHOWN[name]))
    assert task.query_x.shape == (3, 15, len(SHOWN[name]))
