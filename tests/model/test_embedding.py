"""Tokens: how many there are, which exist, and what order, padding and missing cells do to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dopfn_jax.config import ModelConfig
from dopfn_jax.model.embedding import CellEmbedding, Columns, RowEmbedding

pytestmark = pytest.mark.usefixtures("strict_dtypes")

B, N, F, D = 2, 7, 5, 8
Embedding = CellEmbedding | RowEmbedding
TABLE = ("x", "t", "y", "mask", "covariate_mask")


def _embedding(features_per_token: int) -> Embedding:
    config = ModelConfig(width=D, heads=2, features_per_token=features_per_token)
    kind = CellEmbedding if features_per_token else RowEmbedding
    abstract = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: jnp.asarray(2 * rng.normal(size=a.shape) / np.sqrt(a.shape[0]), a.dtype), abstract
    )


@pytest.fixture(scope="module")
def cells() -> Embedding:
    return _embedding(1)


@pytest.fixture(scope="module")
def groups() -> Embedding:
    return _embedding(2)


@pytest.fixture(scope="module")
def rows() -> Embedding:
    return _embedding(0)


def _table() -> dict[str, np.ndarray]:
    """A standardised context, its last row and its last two columns padding."""
    rng = np.random.default_rng(2)
    exists = np.ones((B, F), bool)
    exists[:, 3:] = False
    return {
        "x": np.where(exists[:, None], rng.normal(size=(B, N, F)), 0).astype(np.float32),
        "t": rng.integers(0, 2, (B, N)).astype(np.float32),
        "y": rng.normal(size=(B, N)).astype(np.float32),
        "mask": np.broadcast_to(np.arange(N) < N - 1, (B, N)),
        "covariate_mask": exists,
    }


@jax.jit
def _tokens(embedding: Embedding, table: dict[str, jax.Array]) -> tuple[Columns, jax.Array]:
    columns = embedding.columns(*(table[name] for name in TABLE))
    return columns, embedding(columns, table["x"], table["t"], table["y"])


def test_a_token_per_cell_then_treatment_then_outcome(cells: Embedding):
    table = _table()
    columns, tokens = _tokens(cells, table)
    assert tokens.shape == (B, F + 2, N, D)
    expected = np.concatenate([table["covariate_mask"], np.ones((B, 2), bool)], axis=1)
    np.testing.assert_array_equal(columns.token_mask, expected)
    # Each token depends on its own input alone.
    for name, token in (("t", F), ("y", F + 1)):
        _, changed = _tokens(cells, {**table, name: table[name] + 1})
        differs = np.abs(changed - tokens).max(axis=(0, 2, 3)) > 1e-3
        np.testing.assert_array_equal(np.flatnonzero(differs), [token])


def test_a_token_per_group_exists_where_one_of_its_columns_does(groups: Embedding):
    table = _table()
    columns, tokens = _tokens(groups, table)
    assert tokens.shape == (B, 3 + 2, N, D)
    np.testing.assert_array_equal(columns.token_mask, [[True, True, False, True, True]] * B)
    x = table["x"].copy()
    x[:, :, 2] += 1
    differs = np.abs(_tokens(groups, {**table, "x": x})[1] - tokens).max(axis=(0, 2, 3)) > 1e-3
    np.testing.assert_array_equal(np.flatnonzero(differs), [1])


def test_one_token_per_row(rows: Embedding):
    columns, tokens = _tokens(rows, _table())
    assert tokens.shape == (B, 1, N, D)
    np.testing.assert_array_equal(columns.token_mask, np.ones((B, 1), bool))


def test_a_row_token_does_not_depend_on_the_order_of_columns_or_of_rows(rows: Embedding):
    table = _table()
    _, expected = _tokens(rows, table)
    columns, order = np.array([4, 2, 0, 3, 1]), np.random.default_rng(0).permutation(N)
    shuffled = {
        "x": table["x"][:, order][:, :, columns],
        "covariate_mask": table["covariate_mask"][:, columns],
    } | {name: table[name][:, order] for name in ("t", "y", "mask")}
    _, tokens = _tokens(rows, shuffled)
    np.testing.assert_allclose(tokens, expected[:, :, order], atol=1e-5)


def test_a_row_token_tells_columns_apart_by_what_they_do(rows: Embedding):
    table = _table()
    x = table["x"].copy()
    x[:, 0, [0, 1]] = x[:, 0, [1, 0]]
    _, swapped = _tokens(rows, {**table, "x": x})
    assert np.abs(swapped - _tokens(rows, table)[1])[:, :, 0].max() > 1e-2


@pytest.mark.parametrize("kind", ["cells", "groups", "rows"])
def test_a_missing_cell_is_not_a_zero(kind: str, request: pytest.FixtureRequest):
    embedding, table = request.getfixturevalue(kind), _table()
    tokens = []
    for value in (0.0, np.nan):
        x = table["x"].copy()
        x[0, 2, 1] = value
        tokens.append(_tokens(embedding, {**table, "x": x})[1])
    assert np.isfinite(tokens[1]).all()
    assert np.abs(tokens[0] - tokens[1])[0, :, 2].max() > 1e-2


@pytest.mark.parametrize("kind", ["cells", "groups", "rows"])
def test_tables_without_covariates_have_tokens(kind: str, request: pytest.FixtureRequest):
    embedding, table = request.getfixturevalue(kind), _table()
    none = {name: table[name][..., :0] for name in ("x", "covariate_mask")}
    _, tokens = _tokens(embedding, table | none)
    assert tokens.shape == (B, 1 if kind == "rows" else 2, N, D)
    assert np.isfinite(tokens).all()
    masked = {name: np.zeros_like(table[name]) for name in ("x", "covariate_mask")}
    _, padded = _tokens(embedding, table | masked)
    np.testing.assert_allclose(padded[:, -tokens.shape[1] :], tokens, atol=1e-6)


def test_query_rows_share_one_mark_instead_of_an_outcome(cells: Embedding):
    table = _table()
    columns, context = _tokens(cells, table)
    tokens = cells(columns, *(jnp.asarray(table[name]) for name in ("x", "t")), None)
    np.testing.assert_allclose(tokens[:, :-1], context[:, :-1], atol=1e-5)
    mark = np.broadcast_to(cells.outcome.unknown[...], (B, N, D))
    np.testing.assert_array_equal(tokens[:, -1], mark)


def test_a_context_without_rows_describes_its_columns_finitely(rows: Embedding):
    columns, _ = _tokens(rows, {**_table(), "mask": np.zeros((B, N), bool)})
    assert np.isfinite(columns.readout).all()


def test_columns_that_do_not_exist_add_nothing_to_a_row(rows: Embedding):
    columns, _ = _tokens(rows, _table())
    np.testing.assert_array_equal(columns.readout[:, 3:], 0)
    assert (np.abs(columns.readout[:, :3]).max(axis=(2, 3)) > 0).all()
