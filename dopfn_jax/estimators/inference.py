"""From standardised tables to answers: few compilations, and chunks of bounded memory.

The jitted functions here are the only ones of the estimators. They are compiled once per size, and
rows and columns are padded to sizes from a short list, so a handful of compilations serves all
tables of all estimators in a process.

Axes: B tables, N rows of a table, M query rows, F covariates, C tokens per row, Q buckets.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef
from numpy.typing import NDArray
from tqdm import tqdm

from dopfn_jax.config import ModelConfig
from dopfn_jax.model.attention import scores_at_once
from dopfn_jax.model.bar_distribution import BarDistribution
from dopfn_jax.model.transformer import DoPFN, EncodedContext
from dopfn_jax.predict import cid, encode, predict
from dopfn_jax.tables import Table

# Query rows are answered in chunks of at most this many,
CHUNK_ROWS = 2048
# or fewer, so that attention scores, or keys and values, take at most so many floats (256 MB).
CHUNK_FLOATS = 2**26

# So few queries of a context that is kept are padded to this; up to twice as many, by one row.
_FEW_QUERIES = 8

# Ways to summarise a distribution.
Output = Literal["mean", "median", "mode", "quantiles"]

_Item = TypeVar("_Item")


def _clipped_effects(
    model: DoPFN, context: EncodedContext, query_x: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    """CATE with both expected outcomes kept within low and high, as a 0/1 outcome wants."""
    control, treated = (jnp.clip(cid(model, context, query_x, arm), low, high) for arm in (0, 1))
    return treated - control


def _predict_by_parts(
    structure: PyTreeDef, leaves: Sequence[jax.Array], *arguments: Any
) -> BarDistribution:
    """`predict` by a model that has been taken apart."""
    return predict(jax.tree.unflatten(structure, leaves), *arguments)


jitted_encode = jax.jit(encode)
jitted_predict = jax.jit(_predict_by_parts, static_argnums=0)
_encode_each = jax.jit(jax.vmap(encode, in_axes=(None, 0, 0, 0, 0, None)))
_effects_each = jax.jit(jax.vmap(_clipped_effects, in_axes=(None, 0, None, None, None)))


@dataclass(frozen=True)
class Network:
    """A model that reads tables of F covariates and answers in the standardised units of y.

    Attributes:
        model: the model, on its device.
        covariates: F.
        most_covariates: what the model has been trained for.
        verbose: show progress on a terminal where it takes more than two seconds.
    """

    model: DoPFN
    covariates: int
    most_covariates: int
    verbose: bool = False

    @property
    def columns(self) -> int:
        """Columns after padding."""
        return padded_columns(self.covariates, self.most_covariates)

    @property
    def tokens(self) -> int:
        """C, tokens per row."""
        return tokens_per_row(self.model.config, self.columns)

    def encode(self, table: Table) -> EncodedContext:
        """Reads one table."""
        padded = pad_table(table, padded_rows(len(table.t)), self.columns)
        return jitted_encode(self.model, *padded, self._columns_exist)

    def answers(
        self,
        context: EncodedContext,
        x: NDArray[np.float32],
        t: NDArray[np.float32],
        context_rows: int = 0,
    ) -> Iterator[tuple[BarDistribution, slice]]:
        """Distributions of query rows, in chunks, and the rows that each is about.

        Chunks suit a context of `context_rows`, or this one if it is longer. A chunk is padded: of
        its distributions only the first are those of the rows. There is at least one chunk, even
        for no rows.
        """
        context_rows = max(context_rows, context.mask.shape[-1])
        for rows in self.progress(list(self.chunks(len(x), context_rows)), "queries"):
            size = padded_queries(rows.stop - rows.start)
            query = pad(x[rows], size, self.columns)
            yield jitted_predict(*self._parts, context, query, pad(t[rows], size)), rows

    def chunks(self, rows: int, context_rows: int) -> Iterator[slice]:
        """Slices of query rows within the memory budget; at least one, if it is empty."""
        per_row = self.model.config.heads * self.tokens * context_rows
        size = power_of_two(CHUNK_FLOATS / per_row, 16, CHUNK_ROWS)
        for start in range(0, max(rows, 1), size):
            yield slice(start, min(start + size, rows))

    def effects_by_tables(
        self, tables: Sequence[Table], x: NDArray[np.float32], bounds: tuple[float, float]
    ) -> NDArray[np.float64]:
        """CATE of the query rows (M, F) by each of several tables of similar size, (B, M).

        Args:
            tables: what to learn from, each on its own.
            x: (M, F) query rows.
            bounds: between which expected outcomes lie, standardised.
        """
        config = self.model.config
        size = padded_rows(max(len(table.t) for table in tables))
        per_table = size * self.tokens * (config.heads * size + 2 * config.layers * config.width)
        batch = power_of_two(CHUNK_FLOATS / per_table, 1, len(tables))
        low, high = map(np.float32, bounds)
        estimates = np.zeros((len(tables), len(x)))
        for start in self.progress(range(0, len(tables), batch), "resamples"):
            stop = min(start + batch, len(tables))
            # The last batch is filled up to the size that has been compiled.
            part = [tables[i % len(tables)] for i in range(start, start + batch)]
            padded = zip(*(pad_table(table, size, self.columns) for table in part), strict=True)
            contexts = _encode_each(self.model, *map(np.stack, padded), self._columns_exist)
            for rows in self.chunks(len(x), batch * size):
                query = pad(x[rows], padded_rows(rows.stop - rows.start), self.columns)
                effects = np.asarray(_effects_each(self.model, contexts, query, low, high))
                estimates[start:stop, rows] = effects[: stop - start, : rows.stop - rows.start]
        return estimates

    def progress(self, items: Sequence[_Item], label: str) -> Iterable[_Item]:
        """The items, with a bar on a terminal if they are several and take over two seconds."""
        if not self.verbose or len(items) < 2:
            return items
        return tqdm(items, desc=label, delay=2, leave=False, disable=None)

    @cached_property
    def _parts(self) -> tuple[PyTreeDef, list[jax.Array]]:
        """The model taken apart, which JAX does anew in every call and slowly for Flax modules."""
        leaves, structure = jax.tree.flatten(self.model)
        return structure, leaves

    @property
    def _columns_exist(self) -> NDArray[np.bool_]:
        return np.arange(self.columns) < self.covariates


@partial(jax.jit, static_argnames="output")
def summarise(answer: BarDistribution, output: Output, levels: jax.Array) -> jax.Array:
    """A summary of M distributions: (M,), or (M, S) quantiles at S levels."""
    return answer.quantile(levels) if output == "quantiles" else getattr(answer, output)


@jax.jit
def mixture(members: Sequence[BarDistribution], borders: jax.Array | None) -> BarDistribution:
    """The equal-weight mixture of distributions of M rows.

    Args:
        members: each with logits (M, Q).
        borders: (Q + 1,) borders of the mixture where those of the members differ: the mass between
            neighbouring ones is exact, and is spread evenly. None where they are the same.
    """
    if borders is None:
        logits = jnp.stack([member.logits for member in members])
        return BarDistribution(logits, members[0].borders).average()
    below = sum(member.cdf(borders[1:-1, None]) for member in members) / len(members)
    below = jnp.pad(below, ((1, 0), (0, 0)))
    masses = jnp.diff(jnp.pad(below, ((0, 1), (0, 0)), constant_values=1), axis=0).T
    return BarDistribution(jnp.log(jnp.maximum(masses, 1e-30)), borders)


def tokens_per_row(config: ModelConfig, columns: int) -> int:
    """C, for tables of so many columns."""
    group = config.features_per_token
    return -(-columns // group) + 2 if group else 1


def context_bytes(config: ModelConfig, rows: int, columns: int) -> int:
    """Size of an encoded context of so many rows: keys and values, 2 L C N D numbers."""
    size = jnp.dtype(config.compute_dtype).itemsize
    tokens = tokens_per_row(config, columns)
    return 2 * size * config.layers * tokens * padded_rows(rows) * config.width


def encoding_bytes(config: ModelConfig, rows: int, columns: int) -> int:
    """About the peak memory of encoding: scores and weights of attention, keys and values twice."""
    scores = config.heads * tokens_per_row(config, columns) * padded_rows(rows) ** 2
    return 8 * min(scores, scores_at_once()) + 2 * context_bytes(config, rows, columns)


def padded_rows(rows: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, 128, ... that is at least `rows`."""
    power = max(16, 1 << (rows - 1).bit_length())
    return 3 * power // 4 if power > 16 and rows <= 3 * power // 4 else power


def padded_queries(rows: int) -> int:
    """The smallest of 8, 10, 12, 14, 16, 24, 32, 48, ... that is at least `rows`."""
    return padded_rows(rows) if rows > 2 * _FEW_QUERIES else max(rows + rows % 2, _FEW_QUERIES)


def padded_columns(covariates: int, most: int) -> int:
    """The next multiple of 4, or what the model has been trained for."""
    return min(-(-max(covariates, 1) // 4) * 4, max(most, 1))


def power_of_two(limit: float, lowest: int, highest: int) -> int:
    """The largest power of two within the limit, clipped to lowest and highest."""
    power = 1 << max(0, math.frexp(limit)[1] - 1)
    return max(lowest, min(power, 1 << (highest.bit_length() - 1)))


def pad(values: NDArray, *shape: int) -> NDArray:
    """Zeros appended to every axis, up to the shape."""
    padded = np.zeros(shape, values.dtype)
    padded[tuple(map(slice, values.shape))] = values
    return padded


def pad_table(table: Table, rows: int, columns: int) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Covariates, treatment and outcome padded, and the mask of the rows that exist."""
    exists = np.arange(rows) < len(table.t)
    return pad(table.x, rows, columns), pad(table.t, rows), pad(table.y, rows), exists
