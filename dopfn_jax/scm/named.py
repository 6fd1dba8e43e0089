"""The SCM that users write: named nodes, each with parents, a mechanism and noise.

    scm = SCM({
        "age": normal(50, 10),
        "dose": node(linear({"age": 0.1}), normal()),
        "effect": node(lambda age, dose: dose * jnp.exp(-age / 50), normal(scale=0.1)),
    })

An SCM is immutable and a pytree: its leaves are the arrays inside mechanisms, noise, interventions
and observations, its structure is static. So it passes through `jax.jit`, and `jax.vmap` maps over
many SCMs of one structure.
"""

import difflib
import graphlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from dopfn_jax.scm.distributions import Distribution
from dopfn_jax.scm.nodes import Constant, Node, names_noise
from dopfn_jax.scm.nodes import node as make_node

if TYPE_CHECKING:
    import graphviz
    import networkx

    from dopfn_jax.config import PriorConfig
    from dopfn_jax.scm import structure

# A row count that no coefficient vector is likely to have, so that wrong shapes show.
PROBE_ROWS = 7


class SCMError(ValueError):
    """An SCM, intervention, observation or question that makes no sense; the message says why."""


@jax.tree_util.register_pytree_node_class
class SCM:
    """A structural causal model over named nodes.

    Args:
        nodes: {name: Node}, in any order. A bare distribution is a root with that noise, a bare
            function or `linear(...)` a deterministic node.

    Attributes:
        nodes: {name: Node} in topological order.
        observations: {name: (R,) data, or () for a parameter}, set by `observe`.

    Raises:
        SCMError: an unknown parent, a cycle, a mechanism that fails or returns the wrong shape, or
            a parameter that depends on nodes that vary over rows.
    """

    nodes: dict[str, Node]
    observations: dict[str, jax.Array]

    def __init__(self, nodes: Mapping[str, Node | Distribution | Callable[..., Any]]) -> None:
        given = {name: _as_node(name, value) for name, value in nodes.items()}
        self.nodes = _validated(given)
        self.observations = {}

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[tuple[str, ...], tuple[str, ...]]]:
        """Children and static structure, for JAX."""
        children = (tuple(self.nodes.values()), tuple(self.observations.values()))
        return children, (tuple(self.nodes), tuple(self.observations))

    @classmethod
    def tree_unflatten(
        cls, names: tuple[tuple[str, ...], tuple[str, ...]], children: tuple[Any, ...]
    ) -> Self:
        """Inverse of `tree_flatten`; leaves may be anything, so nothing is validated."""
        scm = object.__new__(cls)
        scm.nodes = dict(zip(names[0], children[0], strict=True))
        scm.observations = dict(zip(names[1], children[1], strict=True))
        return scm

    def replace(
        self,
        nodes: Mapping[str, Node] | None = None,
        observations: Mapping[str, jax.Array] | None = None,
    ) -> Self:
        """A copy with other nodes (a subset, or changed in place) or observations; unchecked."""
        scm = object.__new__(type(self))
        scm.nodes = dict(self.nodes if nodes is None else nodes)
        scm.observations = dict(self.observations if observations is None else observations)
        return scm

    @property
    def names(self) -> tuple[str, ...]:
        """All nodes in topological order."""
        return tuple(self.nodes)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Nodes with one value for all rows."""
        return tuple(name for name, node in self.nodes.items() if not node.per_row)

    @property
    def unknown_parameters(self) -> tuple[str, ...]:
        """Parameters that are random and not observed: what `fit` infers."""
        return tuple(
            name
            for name in self.parameters
            if self.nodes[name].is_random and name not in self.observations
        )

    def require_known_parameters(self) -> None:
        """Raises SCMError where a parameter is random and not observed."""
        for name in self.unknown_parameters:
            raise SCMError(f"parameter {name!r} is unknown: set it by do, or fit the SCM first.")

    def parents(self, name: str) -> tuple[str, ...]:
        """The nodes that the value of `name` depends on; none where `do` has set it to a value."""
        self.require(name)
        return self.nodes[name].inputs

    def children(self, name: str) -> tuple[str, ...]:
        """The nodes whose value depends on `name`."""
        self.require(name)
        return tuple(other for other, node in self.nodes.items() if name in node.inputs)

    def ancestors(self, names: str | Iterable[str]) -> frozenset[str]:
        """All nodes with a directed path to one of `names`, these themselves excluded."""
        names = self.require(names)
        found: set[str] = set()
        for name in reversed(self.nodes):
            if name in names or name in found:
                found.update(self.nodes[name].inputs)
        return frozenset(found.difference(names))

    def descendants(self, names: str | Iterable[str]) -> frozenset[str]:
        """All nodes with a directed path from one of `names`, these themselves excluded."""
        names = self.require(names)
        found = set(names)
        for name, other in self.nodes.items():
            if found.intersection(other.inputs):
                found.add(name)
        return frozenset(found.difference(names))

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """All (parent, child) pairs, children in topological order."""
        return tuple((parent, name) for name, node in self.nodes.items() for parent in node.inputs)

    def unknown_ancestors(self, name: str) -> frozenset[str]:
        """Ancestors of a node that are random and not observed: what data on it tell about."""
        return frozenset(
            other
            for other in self.ancestors(name)
            if self.nodes[other].is_random and other not in self.observations
        )

    @property
    def rows(self) -> int | None:
        """The number of rows that data or interventions fix; None where it is free.

        Raises:
            SCMError: two of them disagree.
        """
        lengths = {name: data.shape[0] for name, data in self.observations.items() if data.ndim}
        for name, node in self.nodes.items():
            if isinstance(node.mechanism, Constant) and np.ndim(node.mechanism.value):
                lengths[name] = np.shape(node.mechanism.value)[0]
        if len(set(lengths.values())) > 1:
            listing = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
            raise SCMError(f"numbers of rows disagree: {listing}.")
        return next(iter(lengths.values()), None)

    def prune(self, outputs: str | Iterable[str]) -> Self:
        """The SCM without the nodes that cannot influence `outputs`.

        Observed nodes that tell about what is kept stay too, with their ancestors.
        """
        outputs = self.require(outputs, "output")
        kept = {*outputs, *self.ancestors(outputs)}
        while informative := {
            name
            for name in self.observations
            if name not in kept and kept & self.unknown_ancestors(name)
        }:
            kept |= informative | self.ancestors(informative)
        return self.replace(
            nodes={name: node for name, node in self.nodes.items() if name in kept},
            observations={n: data for n, data in self.observations.items() if n in kept},
        )

    def require(self, names: str | Iterable[str], what: str = "node") -> tuple[str, ...]:
        """`names` as a tuple.

        Raises:
            SCMError: one of them is no node of this SCM.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            if name not in self.nodes:
                raise SCMError(f"unknown {what} {name!r}{_did_you_mean(name, self.nodes)}")
        return names

    def __repr__(self) -> str:
        return f"SCM({', '.join(self.nodes)})"

    def __str__(self) -> str:
        from dopfn_jax.scm.graphs import to_text

        return to_text(self)

    def to_networkx(self, parameters: bool = True) -> "networkx.DiGraph":
        """The graph, each node with its `Node` as attribute `node`: see `graphs.to_networkx`."""
        from dopfn_jax.scm.graphs import to_networkx

        return to_networkx(self, parameters)

    @classmethod
    def from_networkx(
        cls, graph: "networkx.DiGraph", nodes: Mapping[str, Any] | None = None
    ) -> "SCM":
        """An SCM over a graph: see `graphs.from_networkx`."""
        from dopfn_jax.scm.graphs import from_networkx

        return from_networkx(graph, nodes)

    def to_graphviz(self) -> "graphviz.Digraph":
        """A drawing: see `graphs.to_graphviz`."""
        from dopfn_jax.scm.graphs import to_graphviz

        return to_graphviz(self)

    @classmethod
    def from_prior(cls, key: jax.Array, prior: "PriorConfig | None" = None) -> "SCM":
        """Names an SCM drawn from the prior: see `sampled.from_prior`."""
        from dopfn_jax.scm.sampled import from_prior

        return from_prior(key, prior)

    def to_arrays(self) -> "structure.SCM":
        """The array form that the prior uses: see `sampled.to_arrays`."""
        from dopfn_jax.scm.sampled import to_arrays

        return to_arrays(self)


def _as_node(name: Any, value: Any) -> Node:
    if not isinstance(name, str) or not name:
        raise SCMError(f"node name {name!r}: names are non-empty strings.")
    if isinstance(value, Node):
        return value
    try:
        if isinstance(value, Distribution):
            return make_node(noise=value)
        if callable(value):
            return make_node(value)
    except ValueError as error:
        raise SCMError(f"node {name!r}: {error}") from error
    raise SCMError(
        f"node {name!r} = {value!r}: give node(...), parameter(...), a distribution such as "
        "normal(), or a function of its parents."
    )


def _validated(nodes: dict[str, Node]) -> dict[str, Node]:
    """The nodes in topological order, each marked as varying over rows or not."""
    for name, child in nodes.items():
        if "noise" in nodes and names_noise(child.mechanism):
            raise SCMError(
                f"node {name!r}: its mechanism's argument `noise` is the node's own noise, but "
                "there is a node 'noise', too: rename that one."
            )
        for parent in child.inputs:
            if parent not in nodes:
                hint = _did_you_mean(parent, nodes)
                raise SCMError(f"node {name!r}: unknown parent {parent!r}{hint}")
    ordered: dict[str, Node] = {}
    for name in _topological_order(nodes):
        child = nodes[name]
        varying = [parent for parent in child.inputs if ordered[parent].per_row]
        if not child.per_row and varying:
            raise SCMError(
                f"parameter {name!r} depends on {varying[0]!r}, which varies over rows: make it a "
                "node(...), or depend on parameters only."
            )
        # What an intervention has set for every row may be a single number.
        varies = bool(varying or child.is_random or child.intervened)
        child = child.replace(per_row=child.per_row and varies)
        ordered[name] = child
        if not isinstance(child.mechanism, Constant):
            _check_shape(name, child, ordered)
    return ordered


def _topological_order(nodes: dict[str, Node]) -> list[str]:
    try:
        return list(
            graphlib.TopologicalSorter({n: v.inputs for n, v in nodes.items()}).static_order()
        )
    except graphlib.CycleError as error:
        path = " -> ".join(error.args[1])
        raise SCMError(f"the graph has a cycle: {path}. Remove one of these edges.") from error


def _check_shape(name: str, child: Node, nodes: Mapping[str, Node]) -> None:
    """Raises SCMError where the mechanism does not map rows to rows."""

    def shape(per_row: bool) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((PROBE_ROWS,) if per_row else (), jnp.float32)

    if child.is_random:
        _check_noise(name, child, shape(child.per_row).shape)
    values = {parent: shape(nodes[parent].per_row) for parent in child.inputs}
    noise = shape(child.per_row) if child.is_random else None
    try:
        out = jax.eval_shape(lambda v, e: child.transform(child.natural(v, e)), values, noise)
    except Exception as error:
        raise SCMError(
            f"node {name!r}: its mechanism fails on parents {child.parents!r}: {error}"
        ) from error
    allowed = {(), (PROBE_ROWS,)} if child.per_row else {()}
    if out.shape not in allowed:
        raise SCMError(
            f"node {name!r}: its mechanism maps "
            + ("rows (R,) of its parents" if child.per_row else "single numbers")
            + f" to shape {out.shape} (R = {PROBE_ROWS}); it must return "
            + ("(R,) or (). " if child.per_row else "(). ")
            + "Write one node per entry of a vector."
        )


def _check_noise(name: str, child: Node, shape: tuple[int, ...]) -> None:
    """Raises SCMError where the noise is not one number for each row."""
    try:
        drawn = jax.eval_shape(lambda: child.noise.sample(jax.random.key(0), shape)).shape
    except Exception as error:
        raise SCMError(f"node {name!r}: its distribution cannot be drawn: {error}") from error
    if drawn != shape:
        raise SCMError(
            f"node {name!r}: its distribution draws {drawn} instead of {shape} numbers. Write one "
            "node per entry of a vector."
        )


def _did_you_mean(name: Any, known: Iterable[str]) -> str:
    known = list(known)
    by_lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    hint = f"; did you mean {by_lower[close[0]]!r}?" if close else "."
    return f"{hint} Nodes: {', '.join(known)}."
