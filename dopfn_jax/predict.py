"""The functional API: interventional distributions and effects of one table, for JAX code.

Pure functions of a model and arrays, which pass through `jax.jit` and `jax.vmap`. One call answers
for one table; for many tables of one shape map over everything but the model:

    contexts = jax.vmap(encode, in_axes=(None, 0, 0, 0))(model, x, t, y)
    effects = jax.vmap(cate, in_axes=(None, 0, 0))(model, contexts, query_x)

Values are not checked here, since they may be traced: `dopfn_jax.DoPFNRegressor` does that, and
reads data frames and text too. Very large or very small units are best brought near 1 first.

Axes: N context rows, M query rows, F covariates, Q buckets. F = 0 is a legal table.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dopfn_jax.model.bar_distribution import BarDistribution
from dopfn_jax.model.transformer import DoPFN, EncodedContext

__all__ = ["EncodedContext", "ate", "cate", "cid", "encode", "predict"]


def encode(
    model: DoPFN,
    x: ArrayLike,
    t: ArrayLike,
    y: ArrayLike,
    mask: ArrayLike | None = None,
    covariate_mask: ArrayLike | None = None,
) -> EncodedContext:
    """Reads an observational table once, for any number of queries.

    Args:
        model: the network.
        x: (N, F) covariates from before the treatment, NaN where a cell is missing.
        t: (N,) observed treatment, 0 or 1.
        y: (N,) observed outcome.
        mask: (N,) bool, rows that exist; all by default. Other rows may hold anything.
        covariate_mask: (F,) bool, columns that exist; all by default.

    Returns:
        The context for `predict`, `cid`, `cate` and `ate`; it answers in the units of y.

    Raises:
        ValueError: shapes that do not fit together.
    """
    x, t, y = (jnp.asarray(a, jnp.float32) for a in (x, t, y))
    rows = x.shape[:1]
    mask = jnp.ones(rows, bool) if mask is None else jnp.asarray(mask, bool)
    columns = x.shape[1:]
    exists = (
        jnp.ones(columns, bool) if covariate_mask is None else jnp.asarray(covariate_mask, bool)
    )
    if x.ndim != 2 or not t.shape == y.shape == mask.shape == rows or exists.shape != columns:
        raise ValueError(
            f"x has shape {x.shape}, t {t.shape}, y {y.shape}, mask {mask.shape} and "
            f"covariate_mask {exists.shape}, but they must be (N, F), (N,), (N,), (N,) and (F,); "
            "for several tables at once use jax.vmap."
        )
    x = jnp.where(mask[:, None] & exists[None], x, 0)
    t, y = jnp.where(mask, t, 0), jnp.where(mask, y, 0)
    return model.encode_context(x[None], t[None], y[None], mask[None], exists[None])


def predict(
    model: DoPFN, context: EncodedContext, query_x: ArrayLike, query_t: ArrayLike
) -> BarDistribution:
    """The conditional interventional distribution p(y | do(t), x) of every query row.

    Args:
        model: the network that encoded the context.
        context: from `encode`.
        query_x: (M, F) covariates, NaN where missing.
        query_t: (M,) the treatment that is set, 0 or 1, or one value for all rows.

    Returns:
        A distribution with batch shape (M,), in the units of y. Each row is answered on its own.

    Raises:
        ValueError: shapes that do not fit together.
    """
    scaler = context.scaler
    answer = _standardised(model, context, query_x, query_t)
    return answer.affine(scaler.y_loc[0, 0], scaler.y_scale[0, 0])


def _standardised(
    model: DoPFN, context: EncodedContext, query_x: ArrayLike, query_t: ArrayLike
) -> BarDistribution:
    """As `predict`, of the outcome standardised by the context."""
    x = jnp.asarray(query_x, jnp.float32)
    if context.mask.ndim != 2:
        raise ValueError("the context holds several tables: call this inside jax.vmap over them.")
    columns = context.columns.mask.shape[-1]
    if x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(
            f"query_x has shape {x.shape}, but must be (M, {columns}), as the context has "
            f"{columns} covariates."
        )
    t = jnp.asarray(query_t, jnp.float32)
    if t.shape not in ((), x.shape[:1]):
        raise ValueError(f"query_t has shape {t.shape}, but must be a scalar or {x.shape[:1]}.")
    x = jnp.where(context.columns.mask, x, 0)
    logits = model.decode(context, x[None], jnp.broadcast_to(t, (1, x.shape[0])))[0]
    return model.distribution(logits)


def cid(model: DoPFN, context: EncodedContext, query_x: ArrayLike, query_t: ArrayLike) -> jax.Array:
    """Expected outcome E[y | do(t), x], (M,), in the units of y; arguments as for `predict`."""
    return predict(model, context, query_x, query_t).mean


def cate(model: DoPFN, context: EncodedContext, query_x: ArrayLike) -> jax.Array:
    """Conditional average treatment effect E[y | do(1), x] - E[y | do(0), x].

    Args:
        model: the network that encoded the context.
        context: from `encode`.
        query_x: (M, F) covariates, NaN where missing.

    Returns:
        (M,), in the units of y.

    Raises:
        ValueError: shapes that do not fit together.
    """
    # Of standardised means: those in the units of y round where y lies far from zero.
    control, treated = (_standardised(model, context, query_x, arm).mean for arm in (0.0, 1.0))
    return context.scaler.y_scale[0, 0] * (treated - control)


def ate(
    model: DoPFN, context: EncodedContext, query_x: ArrayLike, query_mask: ArrayLike | None = None
) -> jax.Array:
    """Average treatment effect: the mean of `cate` over the query rows.

    Args:
        model: the network that encoded the context.
        context: from `encode`.
        query_x: (M, F) covariates, NaN where missing.
        query_mask: (M,) bool, rows to average over; all by default.

    Returns:
        A scalar, in the units of y; NaN where there is no row to average over.

    Raises:
        ValueError: shapes that do not fit together.
    """
    effects = cate(model, context, query_x)
    if query_mask is None:
        return jnp.mean(effects)
    mask = jnp.asarray(query_mask, bool)
    if mask.shape != effects.shape:
        raise ValueError(f"query_mask has shape {mask.shape}, but must be {effects.shape}.")
    return jnp.mean(effects, where=mask)
