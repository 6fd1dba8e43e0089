"""Case studies drawn from our own prior, with exact answers, in the released files' format."""

import dataclasses
import functools
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from dopfn_jax.config import PriorConfig
from dopfn_jax.evaluation.datasets import halves
from dopfn_jax.evaluation.truth import exact_cid
from dopfn_jax.prior import LARGEST_VALUE, Roles, sample_scm
from dopfn_jax.scm import propagate, sample_noise
from dopfn_jax.scm.case_studies import CASE_STUDIES
from dopfn_jax.scm.mechanisms import MECHANISM_NAMES
from dopfn_jax.scm.noise import NOISE_FAMILIES
from dopfn_jax.scm.structure import SCM

SEED = 20_251
# Answers whose numerical error is larger than this share of the outcome's range are left out.
LARGEST_ERROR = 5e-3
_ATTEMPTS = 200


@dataclass(frozen=True)
class Study:
    """A distribution over datasets.

    Attributes:
        prior: the distribution over SCMs.
        rows: closed interval of the uniform number of rows of a dataset.
        shown: closed interval of the number of shown covariates; others are drawn anew.
    """

    prior: PriorConfig
    rows: tuple[int, int] = (50, 2000)
    shown: tuple[int, int] = (0, 99)


STUDIES = {
    **{name: Study(PriorConfig(case_study=name)) for name in CASE_STUDIES},
    # Released with the four-family noise.
    "common_effect": Study(PriorConfig(case_study="common_effect", noise_families=NOISE_FAMILIES)),
    "small": Study(PriorConfig(case_study="observed_confounder"), rows=(5, 100)),
    "graph_complexity": Study(
        PriorConfig(min_nodes=3, max_nodes=10, zero_effect_share=0.0), shown=(1, 5)
    ),
}


def write_dataset(path: Path, study: Study, name: str, number: int, exact: bool = True) -> None:
    """Writes the arrays of `draw_dataset`; the file is there completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **draw_dataset(study, name, number, exact=exact))
    os.replace(temporary, path)


def draw_dataset(
    study: Study, name: str, number: int, seed: int = SEED, exact: bool = True
) -> dict[str, Any]:
    """The arrays of one dataset.

    An SCM is drawn again, with the next key, where a context would have one arm only, or where the
    outcome is constant or too large for float32.

    Args:
        study: what to draw from.
        name: the dataset is a function of the study, its name,
        number: its number,
        seed: and the seed.
        exact: also compute E[y | do(t), x].

    Returns:
        What `datasets.load_dataset` reads, and `cid_error` (n,).

    Raises:
        RuntimeError: no usable dataset in many draws.
    """
    stream = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    stream = jax.random.fold_in(stream, number)
    for attempt in range(_ATTEMPTS):
        arrays = _draw(study, jax.random.fold_in(stream, attempt), exact)
        if arrays is not None:
            arrays["meta"]["seed"], arrays["meta"]["attempt"] = seed, attempt
            return {**arrays, "meta": json.dumps(arrays["meta"])}
    raise RuntimeError(f"{name} {number}: no usable dataset in {_ATTEMPTS} draws")


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw_scm(
    key: jax.Array, prior: PriorConfig, rows: int
) -> tuple[SCM, Roles, jax.Array, jax.Array]:
    scm_key, noise_key = jax.random.split(key)
    scm, roles = sample_scm(scm_key, prior)
    noise = sample_noise(noise_key, scm.noise_family, scm.noise_scale, rows, prior.noise_families)
    return scm, roles, noise, propagate(scm, noise)[roles.treatment]


@jax.jit
def _worlds(scm: SCM, noise: jax.Array, treatment: jax.Array) -> jax.Array:
    """Node values (3, K, R): as observed, under do(0), under do(1)."""
    arms = [jnp.full(noise.shape[1], float(arm)) for arm in (0, 1)]
    return jnp.stack(
        [propagate(scm, noise), *(propagate(scm, noise, (treatment, arm)) for arm in arms)]
    )


def _draw(study: Study, key: jax.Array, exact: bool) -> dict[str, Any] | None:
    table_key, scm_key = jax.random.split(key)
    generator = np.random.default_rng(np.asarray(jax.random.key_data(table_key)))
    rows = int(generator.integers(study.rows[0], study.rows[1], endpoint=True))
    scm, roles, noise, raw_t = _draw_scm(scm_key, study.prior, study.rows[1])
    shown = np.asarray(roles.covariates)[np.asarray(roles.covariate_mask)]
    if not study.shown[0] <= len(shown) <= study.shown[1]:
        return None

    candidates = np.asarray(raw_t[:rows])
    candidates = candidates[(candidates > candidates.min()) & (candidates < candidates.max())]
    if not len(candidates):
        return None
    treatment, outcome = int(roles.treatment), int(roles.outcome)
    is_treatment = jnp.arange(scm.binary.shape[0]) == treatment
    threshold = float(generator.choice(candidates))
    scm = dataclasses.replace(
        scm, binary=is_treatment, threshold=jnp.where(is_treatment, threshold, 0.0)
    )
    observed, low, high = np.asarray(_worlds(scm, noise, roles.treatment))[:, :, :rows]
    t_in = generator.integers(0, 2, rows).astype(np.float32)
    y, y0, y1 = observed[outcome], low[outcome], high[outcome]
    y_int = np.where(t_in > 0.5, y1, y0)
    if not _is_usable(observed, observed[treatment], y, y_int):
        return None
    set_worlds = np.where(t_in > 0.5, high, low)
    arrays: dict[str, Any] = {
        "x_obs": np.stack([observed[treatment], *observed[shown]], axis=1),
        "y_obs": y,
        "x_int": np.stack([t_in, *set_worlds[shown]], axis=1),
        "y_int": y_int,
        "y0": y0,
        "y1": y1,
        "meta": _describe(scm, study.prior, treatment, outcome, shown.tolist()),
    }
    if exact:
        answer = exact_cid(scm, treatment, outcome, shown.tolist(), observed[shown].T)
        arrays["cid_error"] = answer.error.astype(np.float32)
        if float(np.sqrt(np.mean(answer.error**2))) <= LARGEST_ERROR * float(np.ptp(y_int)):
            arrays["cid0"] = answer.cid0.astype(np.float32)
            arrays["cid1"] = answer.cid1.astype(np.float32)
    return arrays


def _is_usable(observed: NDArray, t: NDArray, y: NDArray, y_int: NDArray) -> bool:
    context, query = halves(len(y))
    varies = min(np.ptp(y[context]), np.ptp(y_int[query])) > 1e-5 * np.abs(y).max()
    has_both_arms = np.ptp(t[context]) > 0
    return bool(np.all(np.abs(observed) < LARGEST_VALUE) and varies and has_both_arms)


def _describe(
    scm: SCM, prior: PriorConfig, treatment: int, outcome: int, shown: list[int]
) -> dict[str, Any]:
    """The SCM in plain values, nodes in topological order."""
    active = [int(node) for node in np.flatnonzero(np.asarray(scm.active))]
    names = CASE_STUDIES[prior.case_study].nodes if prior.case_study else None
    name = {node: names[node] if names else f"z{node}" for node in active}
    adjacency, scale = np.asarray(scm.adjacency), np.asarray(scm.noise_scale)
    roots = [node for node in active if not adjacency[node].any()]
    others = [node for node in active if node not in roots]
    weights = np.asarray(scm.weights)
    return {
        "nodes": [name[node] for node in active],
        "edges": [
            [name[parent], name[child]]
            for child in active
            for parent in active
            if adjacency[child, parent]
        ],
        "functions": {
            name[node]: {
                "act": MECHANISM_NAMES[int(scm.mechanism[node])],
                "w": {name[p]: float(weights[node, p]) for p in active if adjacency[node, p]},
                "noise": NOISE_FAMILIES[int(scm.noise_family[node])],
                "noise_std": float(scale[node]),
            }
            for node in active
        },
        "t_key": name[treatment],
        "y_key": name[outcome],
        "x_keys": [name[treatment], *(name[node] for node in shown)],
        "noise_std": float(scale[others[0]]) if others else 0.0,
        "exo_std": float(scale[roots[0]]),
        "thr": float(scm.threshold[treatment]),
    }
