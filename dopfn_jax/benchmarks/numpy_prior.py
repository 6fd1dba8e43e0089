"""The peer of the prior: a loop over SCMs in NumPy, one after another, vectorised over rows.

The definition is that of `dopfn_jax.prior`; what a loop can do better it does: no padded nodes, one
observational pass, and an interventional pass over the treatment's descendants alone.

Axes: B tasks, K nodes of this SCM, R rows, N context rows, M query rows, F covariates.
"""

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from dopfn_jax.config import PriorConfig, TableShape
from dopfn_jax.prior import LARGEST_VALUE, Task
from dopfn_jax.scm.noise import STUDENT_T_DEGREES

_Item = TypeVar("_Item")

_MECHANISMS: dict[str, Callable[[NDArray], NDArray]] = {
    "identity": lambda x: x,
    "square": np.square,
    "relu": partial(np.maximum, np.float32(0)),
    "tanh": np.tanh,
}
# Draws of mean 0 and standard deviation 1.
_NOISE: dict[str, Callable[[np.random.Generator, int], NDArray]] = {
    "gaussian": lambda rng, rows: rng.standard_normal(rows, np.float32),
    "laplace": lambda rng, rows: rng.laplace(0, math.sqrt(0.5), rows),
    "student_t": lambda rng, rows: (
        rng.standard_t(STUDENT_T_DEGREES, rows)
        / math.sqrt(STUDENT_T_DEGREES / (STUDENT_T_DEGREES - 2))
    ),
    "gumbel": lambda rng, rows: (
        (rng.gumbel(0, 1, rows) - np.euler_gamma) * (math.sqrt(6) / math.pi)
    ),
}


def sample_tasks(rng: np.random.Generator, prior: PriorConfig, shape: TableShape) -> Task:
    """A batch of independent tasks of the prior over random graphs, as NumPy arrays.

    Fields and masks are those of `dopfn_jax.prior.sample_tasks`, without potential outcomes; named
    case studies are not known here.
    """
    tasks, (low, high), columns = shape.tasks, shape.context, prior.covariates
    context, query = (tasks, high), (tasks, shape.rows - low)
    arrays: dict[str, Any] = {
        "context_x": np.zeros((*context, columns), np.float32),
        "context_t": np.zeros(context, np.float32),
        "context_y": np.zeros(context, np.float32),
        "context_mask": np.zeros(context, bool),
        "query_x": np.zeros((*query, columns), np.float32),
        "query_t": np.zeros(query, np.float32),
        "query_y": np.zeros(query, np.float32),
        "query_mask": np.zeros(query, bool),
        "covariate_mask": np.zeros((tasks, columns), bool),
        "valid": np.zeros(tasks, bool),
    }
    batch = Task(**arrays)
    # A square or a difference of large values may overflow; such a task is not valid.
    with np.errstate(over="ignore", invalid="ignore"):
        for index in range(tasks):
            _fill(batch, index, rng, prior, shape)
    return batch


def _fill(
    batch: Any, index: int, rng: np.random.Generator, prior: PriorConfig, shape: TableShape
) -> None:
    """Draws task `index` of the batch."""
    rows, (low, high) = shape.rows, shape.context
    # One call for all scalars: a call costs more than a number.
    draws = iter(rng.random(2 * prior.nodes**2 + 3 * prior.nodes + 12).tolist())
    nodes = _integer(draws, prior.min_nodes, prior.max_nodes)
    shown = nodes - 2 - _integer(draws, 0, min(max(nodes - 3, 0), prior.max_hidden))
    least = 1 / (shown + 1)
    share = least + (1 - least) * next(draws)
    parents = [[parent for parent in range(k) if next(draws) < share] for k in range(nodes)]
    ancestors: list[set[int]] = []
    for own in parents:
        ancestors.append(set(own).union(*(ancestors[parent] for parent in own)))
    treatment, outcome = _roles(draws, parents, ancestors, prior.zero_effect_share)
    others = np.array([k for k in range(nodes) if k not in (treatment, outcome)], int)
    covariates = rng.permutation(others)[:shown]

    functions = [_MECHANISMS[_choose(draws, prior.mechanisms)] for _ in range(nodes)]
    families = [_NOISE[_choose(draws, prior.noise_families)] for _ in range(nodes)]
    weights = np.zeros((nodes, nodes), np.float32)
    for k, own in enumerate(parents):
        for parent in own:
            weights[k, parent] = (2 * next(draws) - 1) / math.sqrt(len(own))
    root_scale = prior.root_scale[0] + (prior.root_scale[1] - prior.root_scale[0]) * next(draws)
    other_scale = prior.noise_scale * (1 - next(draws) ** (1 / 5))  # Beta(1, 5)
    noise = np.empty((nodes, rows), np.float32)
    for k, own in enumerate(parents):
        np.multiply(
            families[k](rng, rows), np.float32(other_scale if own else root_scale), out=noise[k]
        )

    def value(k: int, z: NDArray, noise: NDArray) -> NDArray:
        return functions[k](weights[k, :k] @ z[:k]) + noise[k] if parents[k] else noise[k]

    observed = np.empty((nodes, rows), np.float32)
    for k in range(nodes):
        observed[k] = value(k, observed, noise)
        if k == treatment:
            observed[k] = observed[k] >= _threshold(draws, observed[k])
    intervened = observed[:, low:].copy()
    if prior.target == "interventional":
        intervened[treatment] = rng.random(rows - low, np.float32) < 0.5
        for k in range(treatment + 1, nodes):
            if treatment in ancestors[k]:
                intervened[k] = value(k, intervened, noise[:, low:])

    split = _integer(draws, low, high)
    query = slice(split - low, None)
    batch.context_mask[index, :split] = True
    batch.query_mask[index, query] = True
    batch.covariate_mask[index, :shown] = True
    t, y = observed[treatment, :split], observed[outcome, :split]
    varies = np.abs(y - y.mean()).max() > 1e-5 * np.abs(y).max()
    if not (_is_sane(observed) and _is_sane(intervened) and varies and t.any() and not t.all()):
        return
    batch.valid[index] = True
    x = observed[covariates]
    batch.context_x[index, :split, :shown] = x[:, :split].T
    batch.context_t[index, :split] = t
    batch.context_y[index, :split] = y
    batch.query_x[index, query, :shown] = x[:, split:].T
    batch.query_t[index, query] = intervened[treatment, query]
    batch.query_y[index, query] = intervened[outcome, query]


def _integer(draws: Iterator[float], low: int, high: int) -> int:
    """Uniform in the closed interval."""
    return low + int(next(draws) * (high - low + 1))


def _choose(draws: Iterator[float], candidates: Sequence[_Item]) -> _Item:
    return candidates[_integer(draws, 0, len(candidates) - 1)]


def _roles(
    draws: Iterator[float],
    parents: list[list[int]],
    ancestors: list[set[int]],
    zero_effect_share: float,
) -> tuple[int, int]:
    """Treatment and outcome."""
    nodes = range(len(parents))
    with_child = sorted(set().union(*parents))
    zero_effect = next(draws) < zero_effect_share or not with_child
    reached = {
        t: [k for k in nodes if k != t and (t in ancestors[k]) != zero_effect] for t in nodes
    }
    treatment = _choose(draws, [t for t in nodes if reached[t]])
    return treatment, _choose(draws, reached[treatment])


def _threshold(draws: Iterator[float], values: NDArray) -> np.float32:
    """One of the values at random, but neither the least nor the largest if there is another."""
    low, high = values.min(), values.max()
    threshold = values[_integer(draws, 0, len(values) - 1)]
    if low < threshold < high:
        return threshold
    inner = values[(values > low) & (values < high)]
    return inner[_integer(draws, 0, len(inner) - 1)] if len(inner) else low


def _is_sane(values: NDArray) -> bool:
    return bool(max(values.max(), -values.min()) < LARGEST_VALUE)


class Workers:
    """Processes that each run the loop; their tables stay with them, so nothing pays for transport.

    Close it, or use it in a `with` statement.
    """

    def __init__(self, processes: int):
        self.processes = processes
        # Not forked: a copy of a process with JAX's threads may hang. One BLAS thread each.
        self._pool = ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), threadpool_limits, (1,)
        )
        self._seeds = np.random.SeedSequence(0)
        self._cpu_seconds = 0.0

    def sample(self, prior: PriorConfig, shape: TableShape) -> None:
        """A batch in every process."""
        seeds = self._seeds.spawn(self.processes)
        parts = [self._pool.submit(_sample_in_worker, seed, prior, shape) for seed in seeds]
        self._cpu_seconds += sum(part.result() for part in parts)

    def cpu_clock(self) -> float:
        """Seconds of processor time that the sampling has taken so far."""
        return self._cpu_seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()


def _sample_in_worker(seed: np.random.SeedSequence, prior: PriorConfig, shape: TableShape) -> float:
    start = time.process_time()
    sample_tasks(np.random.default_rng(seed), prior, shape)
    return time.process_time() - start
