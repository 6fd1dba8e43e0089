"""A small prior, many SCMs and tables of it, and what their numbers should look like."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from dopfn_jax.config import PriorConfig
from dopfn_jax.prior import Task, sample_scm, sample_table

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


def looks_uniform(values, number: int) -> bool:
    """Whether the values look drawn uniformly from 0, ..., number - 1."""
    counts = np.bincount(values, minlength=number)
    if len(counts) > number:
        return False
    return number == 1 or scipy.stats.chisquare(counts).pvalue > CHANCE


def looks_drawn_from(values, distribution) -> bool:
    return scipy.stats.kstest(values, distribution.cdf).pvalue > CHANCE


def has_share(hits, share: float) -> bool:
    return scipy.stats.binomtest(int(np.sum(hits)), len(hits), share).pvalue > CHANCE


def reachable(adjacency: np.ndarray) -> np.ndarray:
    """[b, k, l]: whether l leads to k."""
    reach = adjacency
    for _ in range(adjacency.shape[-1]):
        reach = reach | (reach[:, :, :, None] & adjacency[:, None]).any(axis=2)
    return reach


sample_scms = jax.jit(jax.vmap(functools.partial(sample_scm, prior=PRIOR)))


@functools.partial(jax.jit, static_argnums=3)
def tables_of(keys, scms, roles, prior=PRIOR) -> Task:
    def table(key, scm, roles):
        return sample_table(key, scm, roles, prior, ROWS, CONTEXT, potential_outcomes=True)

    return jax.vmap(table)(keys, scms, roles)


def draw_scms(seed: int, **changes):
    """Keys, SCMs and roles of 2000 tasks; `changes` are functions of (SCMs, roles), by field."""
    keys = jax.random.split(jax.random.key(seed), (2, 2000))
    scms, roles = sample_scms(keys[0])
    changed = {name: jnp.asarray(change(scms, roles)) for name, change in changes.items()}
    return keys[1], dataclasses.replace(scms, **changed), roles


def as_numpy(task: Task) -> Task:
    return jax.tree.map(np.asarray, task)


def without_noise(scms, roles):
    """Noise at the roots alone, so that all other nodes are functions of their parents."""
    return jnp.where(scms.adjacency.any(axis=2), 0.0, scms.noise_scale)


def floats(task: Task) -> dict[str, np.ndarray]:
    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    return {
        name: np.asarray(value)
        for name, value in fields.items()
        if value is not None and value.dtype == np.float32
    }
