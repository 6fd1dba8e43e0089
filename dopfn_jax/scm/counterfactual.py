"""Counterfactuals of observed units by abduction, action and prediction (Pearl, Causality, 7.1)."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dopfn_jax.scm.interventions import Intervention, do, observe
from dopfn_jax.scm.named import SCM, SCMError
from dopfn_jax.scm.nodes import Constant, Node


def counterfactual(
    scm: SCM,
    observed_rows: Mapping[str, ArrayLike],
    do: Mapping[str, Intervention],
    outputs: str | Iterable[str] | None = None,
) -> dict[str, jax.Array]:
    """What the observed units would have been under an intervention.

    The noise of each unit is recovered from its observed values (abduction), the intervention is
    applied (action), and the same noise goes through the changed SCM (prediction). This is exact:
    nothing is drawn. Nodes that the intervention does not reach keep their values, so noise is
    recovered only where it is needed.

    Args:
        scm: the model. What it observes already counts as part of `observed_rows`.
        observed_rows: {node: (R,) factual values}, or a data frame. Deterministic nodes may be
            left out. Unknown parameters must be observed or set by `do` before; after `fit`,
            `Posterior.counterfactual` does that for every draw.
        do: {node: number, (R,) array, or function of the node's natural value}. That value is the
            counterfactual one, where the intervention also reaches the node's ancestors.
        outputs: nodes to return; by default all that are observed or follow from these.

    Returns:
        {node: (R,) counterfactual values}, float32.

    Raises:
        SCMError: an unknown node, data that contradict a deterministic node, or noise that is
            needed but cannot be recovered, because the node or one of its parents is not observed,
            or because its mechanism has no inverse.
    """
    scm, factual = _factual(scm, observed_rows)
    return _predict(scm, factual, do, outputs)


def _factual(scm: SCM, rows: Mapping[str, ArrayLike]) -> tuple[SCM, dict[str, jax.Array]]:
    """The SCM with all rows observed, and the values that they and deterministic nodes have."""
    rows = {name: rows[name] for name in rows.keys()}  # noqa: SIM118 - a data frame iterates otherwise
    scm.require(rows)
    given = {name: data for name, data in rows.items() if not scm.nodes[name].is_random}
    scm = observe(scm, {name: data for name, data in rows.items() if name not in given})
    values: dict[str, jax.Array] = {}
    for name, node in scm.nodes.items():
        if name in scm.observations:
            values[name] = node.transform(jnp.asarray(scm.observations[name]))
        elif not node.is_random and all(parent in values for parent in node.inputs):
            values[name] = node.transform(node.natural(values, None))
            if name in given:
                _require_equal(name, values[name], given[name])
        elif name in given:
            values[name] = jnp.asarray(given[name], jnp.float32)
    return scm, values


def _require_equal(name: str, computed: jax.Array, given: ArrayLike) -> None:
    if isinstance(computed, jax.core.Tracer) or isinstance(given, jax.core.Tracer):
        return
    if not np.allclose(np.asarray(computed), np.asarray(given), rtol=1e-3, atol=1e-3):
        raise SCMError(
            f"counterfactual: the rows give {name!r} values that differ from those that its "
            "parents determine. Leave the column out, or give the node noise."
        )


def _predict(
    scm: SCM,
    factual: Mapping[str, jax.Array],
    interventions: Mapping[str, Intervention],
    outputs: str | Iterable[str] | None,
) -> dict[str, jax.Array]:
    # Where no other intervention reaches a node, its natural value is the observed one.
    nodes = dict(scm.nodes)
    for name in interventions:
        if name in factual and scm.ancestors(name).isdisjoint(interventions):
            nodes[name] = Node(per_row=nodes[name].per_row, mechanism=Constant(factual[name]))
    changed = do(scm.replace(nodes=nodes, observations={}), interventions)
    reached = {*interventions, *scm.descendants(interventions)}
    rows = scm.rows if scm.rows is not None else changed.rows
    if changed.rows not in (None, rows):
        raise SCMError(f"counterfactual: {rows} observed rows, but do has {changed.rows}.")
    values: dict[str, jax.Array] = {}
    missing: dict[str, str] = {}

    for name, node in changed.nodes.items():
        if name not in reached:
            if name in factual:
                values[name] = factual[name]
            else:
                missing[name] = f"{name!r} is not observed"
            continue
        reason = _why_not_recoverable(scm, name, factual) if node.is_random else ""
        unknown = [parent for parent in node.inputs if parent not in values]
        if unknown and not reason:
            reason = f"{name!r} depends on {unknown[0]!r}, and {missing[unknown[0]]}"
        if reason:
            missing[name] = reason
            continue
        noise = scm.nodes[name].recover(factual, factual[name]) if node.is_random else None
        value = node.transform(node.natural(values, noise))
        if node.per_row and rows is not None:
            value = jnp.broadcast_to(value, (rows,))
        values[name] = value

    if outputs is None:
        wanted = [name for name in scm.names if name in factual or name in values]
    else:
        wanted = list(scm.require(outputs, "output"))
    for name in wanted:
        if name in missing:
            raise SCMError(f"counterfactual of {name!r}: {missing[name]}.")
    return {name: values[name] for name in wanted}


def _why_not_recoverable(scm: SCM, name: str, factual: Mapping[str, jax.Array]) -> str:
    node = scm.nodes[name]
    for needed in (name, *node.inputs):
        if needed not in factual:
            return f"the noise of {name!r} cannot be recovered, since {needed!r} is not observed"
    if not node.is_recoverable:
        return (
            f"the noise of {name!r} cannot be recovered from its value: its mechanism is not "
            "additive in the noise. Give node(..., inverse=...), leave the node out of `outputs`, "
            "or set it by do"
        )
    return ""
