"""The operators do and observe: a new SCM in which a node is set, or data are given."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from dopfn_jax.scm.distributions import as_leaf
from dopfn_jax.scm.named import PROBE_ROWS, SCM, SCMError
from dopfn_jax.scm.nodes import Binary, Constant, Linear, Node, as_pytree

Intervention = ArrayLike | Callable[[jax.Array], jax.Array]


def do(
    scm: SCM,
    interventions: Mapping[str, Intervention],
    *,
    prune: bool = False,
    outputs: str | Iterable[str] | None = None,
) -> SCM:
    """The SCM after interventions.

    A number or array replaces a node's mechanism and noise: its incoming edges are cut. A function
    maps the node's natural value, what it would have been, to the new one (b -> 5 b); incoming
    edges then end in the natural value, and children see the new one. A later `do` on the same
    node replaces its value, or applies to it.

    On an observed SCM, a function applies to the node's data, which are its natural value. Data
    below an intervention belong to the world without it and are released: these nodes are random
    again.
    For what would have happened to the very units that were observed, see `counterfactual`.

    Args:
        scm: the model; it is left as it is.
        interventions: {node: number, (R,) array, or function}. Numbers hold for all rows;
            parameters take single numbers only.
        prune: drop every node that cannot influence `outputs`.
        outputs: what to keep when pruning; by default the intervened nodes and their descendants.

    Raises:
        SCMError: an unknown node, a value of the wrong shape or not finite, arrays whose number of
            rows differs from that of the data or of one another, or a mechanism, which would be
            given the node's own value instead of its parents'.
    """
    scm.require(interventions)
    nodes = dict(scm.nodes)
    affected = {*interventions, *scm.descendants(interventions)}
    kept = {
        name: data
        for name, data in scm.observations.items()
        if name not in affected
        or (callable(interventions.get(name)) and scm.ancestors(name).isdisjoint(interventions))
    }
    for name, intervention in interventions.items():
        if callable(intervention):
            _check_argument(scm, name, intervention)
        nodes[name] = _intervened(name, nodes[name], intervention, kept.get(name))
    result = scm.replace(nodes=nodes, observations=kept)
    _ = result.rows  # raises where numbers of rows disagree
    if not prune:
        return result
    return result.prune(affected if outputs is None else outputs)


def _intervened(name: str, old: Node, intervention: Intervention, data: Any) -> Node:
    if callable(intervention):
        function = as_pytree(intervention)
        _check_function(name, old, function, data)
        return old.replace(transforms=(*old.transforms, function), intervened=True)
    value = _as_value("do", name, intervention)
    if value.ndim > int(old.per_row):
        raise SCMError(
            f"do: {name!r} has shape {value.shape}, but "
            + ("must be one number or (R,)." if old.per_row else "is a parameter: one number.")
        )
    return Node(per_row=old.per_row, intervened=True, mechanism=Constant(value))


def _check_argument(scm: SCM, name: str, function: Callable[..., Any]) -> None:
    """Raises SCMError for what looks like a new mechanism."""
    arguments = function.parents if isinstance(function, (Linear, Binary)) else ()
    if not arguments:
        with contextlib.suppress(TypeError, ValueError):  # built-ins have no signature
            first = next(iter(inspect.signature(function).parameters.values()), None)
            # Names that cannot be given, as in jnp.abs(x, /), are not the user's.
            if first is not None and first.kind is not first.POSITIONAL_ONLY:
                arguments = (first.name,)
    for other in arguments:
        if other != name and other in scm.nodes:
            raise SCMError(
                f"do: the function of {name!r} takes {other!r}, another node, but is given the "
                f"natural value of {name!r} itself: call its argument {name!r}. For a new "
                "mechanism build an SCM with it; for values computed from rows pass an array."
            )


def _check_function(name: str, old: Node, function: Callable[[jax.Array], Any], data: Any) -> None:
    """Raises SCMError where the function does not map rows to rows."""
    shape: tuple[int, ...] = (PROBE_ROWS,) if old.per_row else ()
    if data is not None:
        shape = np.shape(data)
    elif isinstance(old.mechanism, Constant):
        shape = np.shape(old.mechanism.value)
    try:
        out = jax.eval_shape(function, jax.ShapeDtypeStruct(shape, np.float32))
    except Exception as error:
        raise SCMError(f"do: the function of {name!r} fails: {error}") from error
    if np.shape(out) not in ((), shape):
        raise SCMError(
            f"do: the function of {name!r} maps shape {shape} to {np.shape(out)}; it must keep it."
        )


def observe(scm: SCM, data: Mapping[str, ArrayLike]) -> SCM:
    """The SCM with data: what `fit` conditions on, and what later steps take as given.

    Args:
        scm: the model; it is left as it is.
        data: {node: (R,) values, or one number for a parameter}, or a data frame.

    Raises:
        SCMError: an unknown node, one that is already observed, set by `do` or deterministic, a
            wrong shape, unequal numbers of rows, or values that are not finite.
    """
    data = {name: data[name] for name in data.keys()}  # noqa: SIM118 - a data frame iterates otherwise
    scm.require(data)
    observations = dict(scm.observations)
    for name, values in data.items():
        target = scm.nodes[name]
        if target.intervened:
            raise SCMError(
                f"observe: {name!r} is set by do, so data on it conflict. Observe the SCM before "
                "do, or leave the node out."
            )
        if name in observations:
            raise SCMError(f"observe: {name!r} is already observed.")
        if not target.is_random:
            raise SCMError(
                f"observe: {name!r} is a deterministic function of {target.inputs!r}. Leave it "
                "out, or give it noise."
            )
        value = _as_value("observe", name, values)
        if value.ndim != int(target.per_row):
            raise SCMError(
                f"observe: {name!r} has shape {value.shape}, but must be "
                + ("(R,), one value per row." if target.per_row else "one number: a parameter.")
            )
        observations[name] = value
    result = scm.replace(observations=observations)
    _ = result.rows  # raises where numbers of rows disagree
    return result


def _as_value(operator: str, name: str, value: Any) -> Any:
    """`value` as float32; concrete values must be finite."""
    if isinstance(value, jax.core.Tracer):
        return as_leaf(value)
    try:
        leaf = as_leaf(value)
    except (TypeError, ValueError) as error:
        raise SCMError(f"{operator}: {name!r} = {value!r} is not numeric.") from error
    if not np.all(np.isfinite(np.asarray(leaf))):
        raise SCMError(
            f"{operator}: {name!r} holds values that are not finite. Drop these rows, or leave the "
            "node out."
        )
    return leaf
