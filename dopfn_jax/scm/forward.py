"""Forward sampling of a named SCM: from a key to noise, from noise to values."""

from collections.abc import Iterable, Mapping
from zlib import crc32

import jax
import jax.numpy as jnp

from dopfn_jax.scm.named import SCM, SCMError


def sample(
    scm: SCM, key: jax.Array, n: int | None = None, outputs: str | Iterable[str] | None = None
) -> dict[str, jax.Array]:
    """Draws rows.

    The same key gives every node the same noise, whatever `do` has changed: draws before and after
    an intervention are potential outcomes of the same units.

    Args:
        scm: the model. Observed nodes keep their data.
        key: a PRNG key.
        n: number of rows R; may be left out where data or interventions fix it.
        outputs: the nodes to return, all by default.

    Returns:
        {node: (R,) values, or () for parameters and what depends on them alone}, float32.

    Raises:
        SCMError: an unknown output, a number of rows that contradicts the data or is missing, or an
            output that observed data tell about: drawing it forward would ignore them.
    """
    outputs = scm.names if outputs is None else scm.require(outputs, "output")
    rows = _row_count(scm, n)
    _require_forward(scm, outputs)
    values = propagate_named(scm, draw_noise(scm, key, rows), rows)
    return {name: values[name] for name in outputs}


def draw_noise(scm: SCM, key: jax.Array, n: int) -> dict[str, jax.Array]:
    """Independent noise {node: (n,), or () for a parameter} of every random node."""
    return {
        name: node.noise.sample(
            # By name, so that a node's noise does not depend on which other nodes there are.
            jax.random.fold_in(key, crc32(name.encode())),
            (n,) if node.per_row else (),
        )
        for name, node in scm.nodes.items()
        if node.is_random
    }


def propagate_named(
    scm: SCM, noise: Mapping[str, jax.Array], n: int | None = None
) -> dict[str, jax.Array]:
    """Values of all nodes from their noise, in one pass through the topological order.

    `propagate` is the same for the array form, where all nodes share one loop body.

    Args:
        scm: the model.
        noise: {node: (R,), or () for a parameter} for every random node that is not observed.
        n: number of rows to broadcast to; by default values keep the shape that they have.

    Returns:
        {node: (R,), or () for parameters}.
    """
    values: dict[str, jax.Array] = {}
    for name, node in scm.nodes.items():
        if name in scm.observations:
            natural = jnp.asarray(scm.observations[name])
        else:
            natural = node.natural(values, noise[name] if node.is_random else None)
        value = node.transform(natural)
        if node.per_row and n is not None:
            value = jnp.broadcast_to(value, (n,))
        values[name] = value
    return values


def _row_count(scm: SCM, n: int | None) -> int:
    fixed = scm.rows
    if n is None:
        if fixed is None:
            raise SCMError("sample: say how many rows, n; no data fix their number.")
        return fixed
    if fixed is not None and n != fixed:
        raise SCMError(f"sample: n = {n}, but data or interventions have {fixed} rows.")
    return n


def _require_forward(scm: SCM, outputs: Iterable[str]) -> None:
    """Refuses outputs that depend on unknowns which observed descendants tell about."""
    needed: set[str] = set()
    stack = list(outputs)
    while stack:
        name = stack.pop()
        if name not in needed:
            needed.add(name)
            if name not in scm.observations:
                stack.extend(scm.nodes[name].inputs)
    for name in scm.observations:
        for unknown in sorted(scm.unknown_ancestors(name) & needed):
            raise SCMError(
                f"{name!r} is observed and tells about {unknown!r}, which sampling forward would "
                f"ignore: fit the SCM, set {unknown!r} by do, or ask for outputs that do not "
                f"depend on it."
            )
