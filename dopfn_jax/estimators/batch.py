"""Many tables in few calls: tables of similar size are stacked, and a mesh spreads them.

Axes: B tables, N rows of a table, M query rows, S numbers per row.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import ArrayLike, NDArray

from dopfn_jax.estimators.inference import (
    CHUNK_FLOATS,
    Network,
    Output,
    pad,
    pad_table,
    padded_columns,
    padded_rows,
    power_of_two,
    summarise,
    tokens_per_row,
)
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.predict import encode, predict
from dopfn_jax.tables import Table


class Question(NamedTuple):
    """A table, and the query rows to answer from it; all standardised by the table.

    Attributes:
        table: N rows.
        x: (M, F) covariates of the queries.
        t: (M,) treatments that are set.
    """

    table: Table
    x: NDArray[np.float32]
    t: NDArray[np.float32]


@partial(jax.jit, static_argnames="output")
def _answer_each(model: DoPFN, output: Output, levels: jax.Array, *stacked: jax.Array) -> jax.Array:
    def answer(*padded: jax.Array) -> jax.Array:
        *context, x, t = padded
        return summarise(predict(model, encode(model, *context), x, t), output, levels)

    return jax.vmap(answer)(*stacked)


def answer_all(
    network: Network,
    questions: Sequence[Question],
    mesh: Mesh | None,
    output: Output = "mean",
    levels: ArrayLike = (),
) -> list[NDArray[np.float64]]:
    """A summary of every query row of every question, standardised by its table.

    The queries of a question are not divided: memory grows with the most that one of them has.

    Args:
        network: the model; its number of covariates does not matter here.
        questions: B of them, of any sizes.
        mesh: devices to spread the tables over; None for the model's own device.
        output: which summary.
        levels: (S,) probabilities, if it is quantiles.

    Returns:
        (M,) for each question, or (M, S).
    """
    by_size: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for index, (table, x, _) in enumerate(questions):
        columns = padded_columns(x.shape[1], network.most_covariates)
        by_size[padded_rows(len(table.t)), padded_rows(len(x)), columns].append(index)

    model = network.model
    place: Callable[[NDArray], jax.Array] = jax.numpy.asarray
    if mesh is not None:
        model = jax.device_put(model, NamedSharding(mesh, P()))
        place = partial(jax.device_put, device=NamedSharding(mesh, P(mesh.axis_names)))

    batches = []
    for size, members in by_size.items():
        rows, queries, columns = size
        tokens, config = tokens_per_row(model.config, columns), model.config
        per_table = rows * tokens * (config.heads * max(rows, queries) + 2 * config.width)
        most = power_of_two(CHUNK_FLOATS / per_table, 1, len(members))
        batch = most if mesh is None else -(-most // mesh.size) * mesh.size
        batches += [(size, batch, members[i : i + batch]) for i in range(0, len(members), batch)]

    answers: list[NDArray[np.float64]] = [np.empty(0)] * len(questions)
    for (rows, queries, columns), batch, members in network.progress(batches, "tables"):
        # A batch that is not full repeats its first table.
        part = [questions[i] for i in [*members, *members[:1] * (batch - len(members))]]
        padded = [
            (
                *pad_table(question.table, rows, columns),
                np.arange(columns) < question.x.shape[1],
                pad(question.x, queries, columns),
                pad(question.t, queries),
            )
            for question in part
        ]
        stacked = [place(np.stack(arrays)) for arrays in zip(*padded, strict=True)]
        found = np.asarray(_answer_each(model, output, np.asarray(levels, np.float32), *stacked))
        for index, answer in zip(members, found, strict=False):
            answers[index] = answer[: len(questions[index].x)].astype(np.float64)
    return answers
