"""The table of awkward inputs: each is answered right, or refused with a column and a remedy."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dopfn_jax.cells import TableError
from dopfn_jax.estimators import DoPFNRegressor
from dopfn_jax.estimators.transforms import TRANSFORMS
from tests.estimators.small import ROWS, assert_same, table

K = np.arange(ROWS) % 15 - 7  # small integers, both signs


def column(values: Any) -> Callable[..., tuple]:
    """Changes the column "dose"."""
    return lambda X, t, y: (X.assign(dose=values), t, y)


# What comes, and another way to say the same that is not awkward.
RIGHT = {
    "a constant column": (column(3e9), column(0.0)),
    "an empty column": (column(None), column(np.full(ROWS, np.nan))),
    "two equal columns": (
        lambda X, t, y: (X.assign(dose=X["age"]), t, y),
        lambda X, t, y: (X.assign(dose=10 * X["age"] + 1), t, y),
    ),
    "integers at the edge of int64": (column(K.astype(np.int64) * 2**60), column(K / 10)),
    "integers at the edge of uint64": (column((K + 7).astype(np.uint64) * 2**60), column(K / 10)),
    "integers that int8 cannot add up": (column((K * 18).astype(np.int8)), column(K / 10)),
    "integers beyond int64": (column([int(k) * 10**30 for k in K]), column(K / 10)),
    "objects that are numbers": (
        lambda X, t, y: (X.astype(object), t.astype(object), y.astype(object)),
        lambda X, t, y: (X, t, y),
    ),
    "numbers as text": (column([f" {k} " for k in K]), column(K)),
    "missing cells in many spellings": (
        column([pd.NA, None, np.nan, "", " nan ", *K[5:]]),
        column([*[np.nan] * 5, *K[5:]]),
    ),
    "sparse columns": (column(pd.arrays.SparseArray(K * 1.0)), column(K)),
    "pandas strings": (
        column(pd.array(np.where(K > 0, "yes", "no"), "string")),
        column((K > 0).astype(float)),
    ),
    "nullable integers": (column(pd.array([*K[:-1], None], "Int64")), column([*K[:-1], np.nan])),
    "text": (column(np.where(K > 0, "yes", "no")), column((K > 0).astype(float))),
    "boolean covariates": (column(K > 0), column((K > 0).astype(float))),
    "a boolean treatment": (lambda X, t, y: (X, t == 1, y), lambda X, t, y: (X, t, y)),
    "a treatment of floats": (lambda X, t, y: (X, t * 1.0, y), lambda X, t, y: (X, t, y)),
    "outcomes as text": (lambda X, t, y: (X, t, y.astype(str)), lambda X, t, y: (X, t, y)),
    "one table in JAX": (
        lambda X, t, y: tuple(map(jnp.asarray, (X.to_numpy(), t, y.astype(np.float32)))),
        lambda X, t, y: (X.to_numpy().astype(np.float32), t, y.astype(np.float32)),
    ),
    "columns of vectors": (
        lambda X, t, y: (X, t[:, None], pd.DataFrame({"kg": y})),
        lambda X, t, y: (X, t, y),
    ),
    "lists": (
        lambda X, t, y: (X.to_numpy().tolist(), t.tolist(), y.tolist()),
        lambda X, t, y: (X.to_numpy(), t, y),
    ),
    "a boolean outcome": (
        lambda X, t, y: (X, t, y > 10),
        lambda X, t, y: (X, t, (y > 10).astype(int)),
    ),
}

# What comes, and what the message says: the column and the remedy.
WRONG = {
    "inf": (column(np.where(K > 6, np.inf, K)), r"column 'dose' holds inf in row 14.*use NaN"),
    "minus inf": (column(np.where(K > 6, -np.inf, K)), r"column 'dose' holds -inf in row 14"),
    "an infinite outcome": (
        lambda X, t, y: (X, t, np.where(K > 6, np.inf, y)),
        "outcome y holds inf in row 14",
    ),
    "a missing treatment": (
        lambda X, t, y: (X, np.where(K > 6, np.nan, t), y),
        "treatment t is missing in 1 rows, the first being row 14: leave such rows out",
    ),
    "dates": (column(pd.date_range("2021-01-01", periods=ROWS)), "'dose' holds dates.*days since"),
    "dates as text": (column(["2021-01-31"] * ROWS), "'dose' holds dates or times.*days since"),
    "numbers mixed with text": (column([*K[:-1], "low"]), "'dose' mixes numbers.*make such cells"),
    "lengths of time": (column(pd.to_timedelta(K, unit="D")), "'dose' holds dates or times.*days"),
    "lists in cells": (column([[1]] * ROWS), "'dose' holds values that are no numbers"),
    "complex numbers": (column(K + 1j), "'dose' holds complex numbers: use real"),
    "a treatment of 1 and 2": (lambda X, t, y: (X, t + 1, y), "treatment t must .*recode.*t == 2"),
    "a treatment in words": (
        lambda X, t, y: (X, pd.Series(np.where(t, "drug", "none"), name="arm"), y),
        "treatment 'arm' must hold 0 and 1.*recode it",
    ),
    "one arm": (lambda X, t, y: (X, 0 * t, y), "treatment t is 0 in all 16 rows.*needs rows with"),
    "a missing outcome": (
        lambda X, t, y: (X, t, np.where(t, y, np.nan)),
        "outcome y is missing in 8 rows.*leave such rows out",
    ),
    "a constant outcome": (lambda X, t, y: (X, t, 0 * y), "outcome y is 0 in all.*right column"),
    "zero rows": (lambda X, t, y: (X[:0], t[:0], y[:0]), "the table is empty"),
    "one name twice": (
        lambda X, t, y: (X.set_axis(["a", "dose", "dose"], axis=1), t, y),
        "more than one column 'dose': rename or drop",
    ),
    "a single covariate without its axis": (
        lambda X, t, y: (X["dose"], t, y),
        r"X has shape \(16,\).*for one covariate use X\.to_frame\(\)",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers(checkpoint, name: str) -> None:
    awkward, plain = (change(*table()) for change in RIGHT[name])
    found, expected = (DoPFNRegressor(checkpoint).fit(*parts) for parts in (awkward, plain))
    assert np.isfinite(expected.cate()).all()
    assert_same(found.cate(awkward[0]), expected.cate(plain[0]))
    assert_same(found.predict(awkward[0], 1), expected.predict(plain[0], 1))


@pytest.mark.parametrize("name", WRONG)
def test_refusals(checkpoint, name: str) -> None:
    change, message = WRONG[name]
    with pytest.raises(TableError, match=message):
        DoPFNRegressor(checkpoint).fit(*change(*table()))


# What later rows hold in place of "dose", and what the message says.
WRONG_QUERIES = {
    "inf": (lambda X: X.assign(dose=np.inf), "column 'dose' holds inf in row 0.*use NaN"),
    "dates": (
        lambda X: X.assign(dose=pd.Timestamp("2021-01-01")),
        "column 'dose' holds dates.*days since",
    ),
    "text": (lambda X: X.assign(dose="low"), "column 'dose' held numbers .* now holds 'low'"),
    "overflow": (lambda X: X.assign(dose=10**400), "column 'dose' holds inf in row 0.*rescale"),
    "a column less": (lambda X: X.drop(columns="dose"), "X lacks 'dose'.* in any order"),
    "a column more": (lambda X: X.assign(extra=1), "X has 'extra' in addition.* in any order"),
    "one row without its axis": (lambda X: X.iloc[0], r"X has shape \(3,\)"),
}


@pytest.mark.parametrize("name", WRONG_QUERIES)
def test_refused_queries(fitted, name: str) -> None:
    change, message = WRONG_QUERIES[name]
    with pytest.raises(TableError, match=message):
        fitted.cate(change(table()[0]))


def test_queries(checkpoint, fitted) -> None:
    X, t, y = table()
    np.testing.assert_array_equal(fitted.cate(X[["score", "age", "dose"]]), fitted.cate(X))
    assert fitted.cate(X[:0]).shape == (0,)
    for same in (X.astype(object), X.astype(str), X.set_index(np.repeat("row", ROWS))):
        np.testing.assert_allclose(fitted.cate(same), fitted.cate(X), rtol=1e-5)
    with pytest.warns(UserWarning, match="matched by position"):
        np.testing.assert_array_equal(fitted.cate(X.to_numpy()), fitted.cate(X))
    model = DoPFNRegressor(checkpoint).fit(X.assign(dose=np.where(K > 0, "yes", "no")), t, y)
    with pytest.raises(TableError, match=r"'dose' holds 'maybe', unseen.*use NaN for an unknown"):
        model.cate(X.assign(dose="maybe"))
    assert np.isfinite(model.cate(X.assign(dose=None))).all()


KINDS: list[Callable[[np.ndarray], Any]] = [
    lambda v: v,
    lambda v: v.astype(np.float32),
    lambda v: v.astype(np.float16),
    lambda v: (100 * v).astype(np.int8),
    lambda v: np.abs(100 * v).astype(np.uint64),
    lambda v: v > 0,
    lambda v: np.where(v > 0, "high", "low").astype(object),
    lambda v: pd.Categorical(np.where(v > 0, "b", "a"), ["c", "b", "a"]),
    lambda v: pd.array(np.where(v > 0, None, np.round(v)), "Float64"),
    lambda v: np.where(v > 1, np.nan, v),
    lambda v: np.full(len(v), 7),
]


@settings(max_examples=25)
@given(
    kinds=st.lists(st.sampled_from(KINDS), max_size=4),
    rows=st.integers(2, 16),
    queries=st.integers(0, 16),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
    transform=st.sampled_from(TRANSFORMS),
)
def test_any_table_of_good_columns_is_answered(
    checkpoint, kinds, rows: int, queries: int, seed: int, scale: float, transform: str
) -> None:
    generator = np.random.default_rng(seed)
    columns = {f"c{i}": kind(generator.normal(size=rows)) for i, kind in enumerate(kinds)}
    X = pd.DataFrame(columns, index=range(rows))
    query = X.iloc[generator.integers(rows, size=queries)]
    t = generator.permutation(np.arange(rows) % 2)
    y = scale * generator.normal(size=rows)
    model = DoPFNRegressor(checkpoint, transforms=(transform,)).fit(X, t, y)
    effects = model.cate(query)
    assert effects.shape == (queries,)
    assert np.isfinite(effects).all()
    order = generator.permutation(queries)
    assert model.effect(query.iloc[order], T0=1, T1=0) == pytest.approx(
        -effects[order], rel=1e-4, abs=1e-5 * scale
    )
