"""Fitting an SCM to data given only its graph: one regression per node, residuals as noise.

Where the graph is right and nothing is hidden, its answers are the ones to beat for methods that do
not know the graph; the role that DoWhy's graphical causal models play.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from dopfn_jax.scm.distributions import empirical, uniform
from dopfn_jax.scm.forward import sample
from dopfn_jax.scm.interventions import Intervention, observe
from dopfn_jax.scm.interventions import do as intervene
from dopfn_jax.scm.named import SCM, SCMError
from dopfn_jax.scm.nodes import Node, as_pytree, linear, node

if TYPE_CHECKING:
    import networkx


def fit_mechanisms(
    graph: "networkx.DiGraph | SCM | Mapping[str, Sequence[str]]",
    data: Mapping[str, ArrayLike],
    regressor: Any = "linear",
    *,
    folds: int = 5,
    seed: int = 0,
) -> SCM:
    """An additive-noise SCM over a known graph, fitted node by node.

    Roots get the empirical distribution of their data. Other nodes get a regression on their
    parents plus noise that resamples out-of-fold residuals, so that a flexible regressor does not
    understate it. The result is an `SCM` like any other: `do`, `sample`, `counterfactual`,
    `interventional`.

    Args:
        graph: the parents of every node: a networkx.DiGraph, an SCM whose edges are taken, or
            {node: [parents]}.
        data: {node: (R,) values} of all nodes, or a data frame.
        regressor: "linear" (least squares, differentiable, on any device), a scikit-learn
            regressor, or {node: one of these} where others are linear. A scikit-learn classifier
            makes its node, which must be 0 or 1, a draw from the predicted probability, whose noise
            cannot be recovered.
        folds: folds for the residuals; 0 takes those of the final fit.
        seed: of the split into folds.

    Raises:
        SCMError: a node without data, a cycle, too few rows for the folds, values that are not
            finite, or an unknown regressor.
    """
    parents = _parents_of(graph)
    columns = _columns(parents, data)
    rows = len(next(iter(columns.values())))
    if folds and rows < 2 * folds:
        raise SCMError(f"fit_mechanisms: {rows} rows are too few for {folds} folds; set folds=0.")
    if isinstance(regressor, Mapping):
        for name in regressor:
            if not parents.get(name):
                raise SCMError(f"fit_mechanisms: regressor for {name!r}, which has no parents.")
    nodes: dict[str, Node] = {}
    for name, its_parents in parents.items():
        y = columns[name]
        if not its_parents:
            nodes[name] = node(noise=empirical(y))
            continue
        x = np.column_stack([columns[parent] for parent in its_parents])
        chosen = regressor.get(name, "linear") if isinstance(regressor, Mapping) else regressor
        nodes[name] = _fit_node(name, its_parents, x, y, chosen, folds, seed)
    return SCM(nodes)


def interventional(
    scm: SCM,
    rows: Mapping[str, ArrayLike],
    do: Mapping[str, Intervention],
    key: jax.Array,
    samples: int = 100,
    outputs: str | Iterable[str] | None = None,
) -> dict[str, jax.Array]:
    """Mean of every node under an intervention on units of which `rows` are known.

    What the intervention cannot change keeps the row's value; what it can change is drawn anew
    `samples` times. The rows' own values of such nodes are not used: for these see
    `counterfactual`, and to condition on them see `true_cid`.

    Args:
        scm: the model.
        rows: {node: (R,) values}, or a data frame; at least one node.
        do: {node: number, (R,) array, or function of the natural value}.
        key: a PRNG key.
        samples: Monte Carlo draws per row.
        outputs: the nodes to return, all by default.

    Returns:
        {node: (R,) means}.

    Raises:
        SCMError: an unknown parameter, or as for `do`, `observe` and `sample`.
    """
    rows = {name: rows[name] for name in rows.keys()}  # noqa: SIM118 - a data frame iterates otherwise
    scm.require(rows)
    if not rows:
        raise SCMError("interventional: give the rows of at least one node; for none, use sample.")
    lengths = [np.shape(v)[0] for n, v in rows.items() if scm.nodes[n].per_row and np.ndim(v)]
    if not lengths:
        raise SCMError(
            f"interventional: {', '.join(rows)} hold no rows: give (R,) values of at least one "
            "node that varies over rows; for none, use sample."
        )
    size = lengths[0]

    def repeated(value: Any) -> Any:
        return (
            value
            if callable(value) or not np.ndim(value)
            else jnp.tile(jnp.asarray(value), samples)
        )

    data = {n: jnp.asarray(v, jnp.float32) for n, v in rows.items() if scm.nodes[n].is_random}
    model = intervene(
        observe(scm, {name: repeated(value) for name, value in data.items()}),
        {name: repeated(value) for name, value in do.items()},
    )
    model.require_known_parameters()
    values = sample(model, key, size * samples, outputs)
    return {
        name: value.reshape(samples, size).mean(axis=0) if value.ndim else value
        for name, value in values.items()
    }


def _parents_of(
    graph: "networkx.DiGraph | SCM | Mapping[str, Sequence[str]]",
) -> dict[str, tuple[str, ...]]:
    if isinstance(graph, SCM):
        known = set(graph.parameters)
        return {
            name: tuple(parent for parent in child.inputs if parent not in known)
            for name, child in graph.nodes.items()
            if child.per_row
        }
    if isinstance(graph, Mapping):
        listed = {name: tuple(its_parents) for name, its_parents in graph.items()}
        roots = {parent: () for its_parents in listed.values() for parent in its_parents}
        return {**roots, **listed}
    return {name: tuple(graph.predecessors(name)) for name in graph}


def _columns(
    parents: Mapping[str, Any], data: Mapping[str, ArrayLike]
) -> dict[str, NDArray[np.float64]]:
    columns = {}
    for name in parents:
        if name not in data:
            raise SCMError(f"fit_mechanisms: no data on node {name!r}; have {', '.join(data)}.")
        columns[name] = np.asarray(data[name], np.float64)
        if columns[name].ndim != 1 or not np.all(np.isfinite(columns[name])):
            raise SCMError(f"fit_mechanisms: {name!r} must be (R,) finite numbers.")
    if len({len(column) for column in columns.values()}) != 1:
        raise SCMError("fit_mechanisms: the columns differ in length.")
    return columns


def _fit_node(
    name: str,
    parents: tuple[str, ...],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    regressor: Any,
    folds: int,
    seed: int,
) -> Node:
    from sklearn.base import clone, is_classifier
    from sklearn.linear_model import LinearRegression
    from sklearn.model_selection import KFold, cross_val_predict

    if regressor == "linear":
        estimator: Any = LinearRegression()
    elif hasattr(regressor, "fit") and hasattr(regressor, "predict"):
        estimator = clone(regressor)
    else:
        raise SCMError(
            f"fit_mechanisms: regressor {regressor!r} of {name!r}: choose 'linear' or give a "
            "scikit-learn regressor or classifier."
        )
    estimator.fit(x, y)
    if is_classifier(estimator):
        if not np.all(np.isin(y, (0, 1))) or len(np.unique(y)) < 2:
            raise SCMError(f"fit_mechanisms: {name!r} has a classifier, so it must hold 0 and 1.")
        drawn = _Drawn(_Prediction(lambda rows: estimator.predict_proba(rows)[:, 1]))
        return Node(parents, as_pytree(drawn), uniform(), takes_noise=True)
    if folds:
        split = KFold(folds, shuffle=True, random_state=seed)
        residuals = y - cross_val_predict(clone(estimator), x, y, cv=split)
    else:
        residuals = y - estimator.predict(x)
    noise = empirical(residuals - residuals.mean())
    if regressor == "linear":
        weights = dict(zip(parents, estimator.coef_, strict=True))
        return node(linear(weights, float(estimator.intercept_)), noise)
    return Node(parents, as_pytree(_Prediction(estimator.predict)), noise)


@dataclass(frozen=True, eq=False)
class _Prediction:
    """A NumPy function of rows as a mechanism: called directly, or by a callback where traced."""

    predict: Callable[[NDArray[Any]], NDArray[Any]]

    def __call__(self, *parents: jax.Array) -> jax.Array:
        parents = tuple(jnp.broadcast_arrays(*parents))
        if any(isinstance(parent, jax.core.Tracer) for parent in parents):
            out = jax.ShapeDtypeStruct(parents[0].shape, jnp.float32)
            return jax.pure_callback(self._on_host, out, *parents, vmap_method="broadcast_all")
        return jnp.asarray(self._on_host(*parents))

    def _on_host(self, *parents: jax.Array) -> NDArray[np.float32]:
        columns = [np.asarray(parent, np.float64) for parent in parents]
        rows = np.stack([column.ravel() for column in columns], axis=1)
        return np.asarray(self.predict(rows), np.float32).reshape(columns[0].shape)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """1 where uniform noise lies below the predicted probability, else 0."""

    probability: _Prediction

    def __call__(self, *parents_and_noise: jax.Array) -> jax.Array:
        *parents, noise = parents_and_noise
        return (noise < self.probability(*parents)).astype(jnp.float32)
