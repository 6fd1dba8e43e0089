"""One node of a named SCM: its parents, its mechanism and its noise.

A mechanism is any callable of the parents' values, or of the parents' values and, as a last
argument called `noise`, the node's noise. Its own arrays are differentiated and mapped over when it
is a JAX pytree, as those of `linear` and `binary` are; a plain function holds none.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from dopfn_jax.scm.distributions import Bernoulli, Distribution, Noise, as_leaf, is_discrete
from dopfn_jax.scm.mechanisms import MECHANISM_NAMES, MECHANISMS, apply_mechanism

Values = Mapping[str, jax.Array]

# By how much discrete noise that is recovered may miss a whole number.
_ROUNDING = 1e-4


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["mechanism", "noise", "inverse", "transforms"],
    meta_fields=["parents", "takes_noise", "per_row", "intervened"],
)
@dataclass(frozen=True, eq=False)
class Node:
    """One structural equation; build it with `node` or `parameter`.

    The value is mechanism(parents) + noise, or mechanism(parents, noise) where `takes_noise`, and
    then goes through `transforms`, the functions that interventions put on top.
    """

    parents: tuple[str, ...] = ()
    mechanism: Any = None
    noise: Any = None
    inverse: Any = None
    transforms: tuple[Any, ...] = ()
    takes_noise: bool = False
    per_row: bool = True
    intervened: bool = False

    @property
    def scale_parent(self) -> str:
        """Name of the node that holds the noise's scale, or ""."""
        return self.noise.scale_parent if isinstance(self.noise, Noise) else ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """All nodes that the value depends on: the mechanism's arguments, then the scale."""
        return (*self.parents, self.scale_parent) if self.scale_parent else self.parents

    @property
    def is_random(self) -> bool:
        """Whether the node has noise of its own."""
        return self.noise is not None

    @property
    def is_discrete(self) -> bool:
        """Whether the value is 0 or 1, so that equality with an observed value can be asked."""
        return isinstance(self.mechanism, Binary) or (
            self.mechanism is None and isinstance(self.noise, Bernoulli)
        )

    @property
    def is_recoverable(self) -> bool:
        """Whether noise follows from the node's value and its parents'."""
        return self.is_invertible and not self.transforms

    @property
    def is_invertible(self) -> bool:
        """Whether noise follows from the node's natural value and its parents'."""
        return self.is_random and (not self.takes_noise or self.inverse is not None)

    def location(self, values: Values) -> jax.Array:
        """What noise is added to."""
        if self.mechanism is None:
            return jnp.zeros(())
        return _as_float(self.mechanism(*(values[name] for name in self.parents)))

    def natural(self, values: Values, noise: jax.Array | None) -> jax.Array:
        """The value from before any function intervention, given all `inputs` and the noise."""
        if self.takes_noise:
            return _as_float(self.mechanism(*(values[name] for name in self.parents), noise))
        location = self.location(values)
        return location if noise is None else location + self._scale(values) * noise

    def transform(self, value: jax.Array) -> jax.Array:
        """The value that children see, from the natural one."""
        for function in self.transforms:
            value = _as_float(function(value))
        return value

    def recover(self, values: Values, value: jax.Array) -> jax.Array:
        """The noise that led to the natural `value`, given all `inputs`; needs `is_invertible`."""
        if self.takes_noise:
            return self.inverse(value, *(values[name] for name in self.parents))
        return (value - self.location(values)) / self._scale(values)

    def log_density(self, values: Values, value: jax.Array) -> jax.Array:
        """Log density of the natural `value` given all `inputs`, elementwise.

        Needs `is_invertible`. Of discrete noise it is the log probability.
        """
        recover = partial(self.recover, values)
        if is_discrete(self.noise):
            return _log_mass(self.noise, recover(value))
        noise, slope = jax.jvp(recover, (value,), (jnp.ones_like(value),))
        return self.noise.log_prob(noise) + jnp.log(jnp.abs(slope))

    def replace(self, **changes: Any) -> "Node":
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)

    def _scale(self, values: Values) -> jax.Array:
        return values[self.scale_parent] if self.scale_parent else jnp.ones(())


def _as_float(value: ArrayLike) -> jax.Array:
    """Comparisons as 0 and 1, and whole numbers, as data of the same node would be."""
    array = jnp.asarray(value)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)


def _log_mass(noise: Distribution, value: jax.Array) -> jax.Array:
    """Log probability of discrete noise, -inf off its support; rounding is forgiven."""
    whole = jnp.round(value)
    possible = jnp.abs(value - whole) < _ROUNDING
    support = getattr(noise, "support", None)  # NumPyro's do not ask whether they can hold a value
    if support is not None:
        possible &= support(whole)
    return jnp.where(possible, noise.log_prob(whole), -jnp.inf)


def node(
    mechanism: Callable[..., Any] | None = None,
    noise: Distribution | None = None,
    parents: tuple[str, ...] | list[str] | None = None,
    inverse: Callable[..., Any] | None = None,
) -> Node:
    """A node with one value per row.

    Args:
        mechanism: function of the parents' values, (R,) each, to which noise is added; or of the
            parents' values and a last argument called `noise`. None for a root.
        noise: distribution of the noise; None for a deterministic node.
        parents: names in the order of the mechanism's arguments; by default its argument names.
        inverse: function (value, *parents) -> noise, which makes counterfactuals and likelihoods
            possible for a mechanism that takes `noise` itself.

    Raises:
        ValueError: neither mechanism nor noise, parents that cannot be inferred, a mechanism that
            takes noise where there is none, or an inverse where none is needed.
        TypeError: a mechanism that cannot be called or noise that is no distribution.
    """
    if mechanism is None and noise is None:
        raise ValueError("a node needs a mechanism, noise, or both.")
    if mechanism is not None and not callable(mechanism):
        raise TypeError(f"mechanism = {mechanism!r} cannot be called; linear({{...}}) makes one.")
    if noise is not None and not isinstance(noise, Distribution):
        raise TypeError(
            f"noise = {noise!r} is no distribution: use normal(), half_normal(), ..., or one of "
            "NumPyro's."
        )
    names, takes_noise = _signature(mechanism, parents)
    if takes_noise and noise is None:
        raise ValueError("the mechanism takes `noise`, so the node needs a noise distribution.")
    if inverse is not None and not takes_noise:
        raise ValueError("an inverse is only for mechanisms that take `noise` as last argument.")
    if takes_noise and isinstance(noise, Noise) and noise.scale_parent:
        raise ValueError(
            f"the mechanism takes `noise`, so it must scale it itself: make {noise.scale_parent!r} "
            "a parent and give the noise a number as scale."
        )
    return Node(
        parents=names,
        mechanism=None if mechanism is None else as_pytree(mechanism),
        noise=noise,
        inverse=None if inverse is None else as_pytree(inverse),
        takes_noise=takes_noise,
    )


def parameter(
    prior: Distribution,
    mechanism: Callable[..., Any] | None = None,
    parents: tuple[str, ...] | list[str] | None = None,
) -> Node:
    """A node with one value for all rows: an unknown coefficient or scale, with its prior.

    Args:
        prior: its distribution; with a `mechanism`, the distribution of what is added to it.
        mechanism: function of other parameters, for hierarchical models.
        parents: as for `node`.
    """
    return node(mechanism, prior, parents).replace(per_row=False)


def as_pytree(function: Callable[..., Any]) -> Any:
    """`function` itself where it is a pytree, else wrapped so that JAX treats it as static."""
    return Partial(function) if jax.tree_util.all_leaves([function]) else function


def names_noise(mechanism: Callable[..., Any] | None) -> bool:
    """Whether the last argument is called `noise`, and so given the node's own."""
    try:
        return list(inspect.signature(mechanism).parameters)[-1:] == ["noise"]  # type: ignore[arg-type]
    except (TypeError, ValueError):  # none, or without a signature
        return False


def _signature(
    mechanism: Callable[..., Any] | None, parents: tuple[str, ...] | list[str] | None
) -> tuple[tuple[str, ...], bool]:
    """Names of the parents, and whether the mechanism takes noise as its last argument."""
    if isinstance(parents, str):
        raise ValueError(f"parents = {parents!r}: write parents=({parents!r},).")
    if mechanism is None:
        if parents:
            raise ValueError(f"parents = {tuple(parents)!r}, but no mechanism that uses them.")
        return (), False
    if isinstance(mechanism, (Linear, Binary)):
        if parents is not None and tuple(parents) != mechanism.parents:
            raise ValueError(f"parents = {parents!r}, but the mechanism has {mechanism.parents!r}.")
        return mechanism.parents, isinstance(mechanism, Binary)
    try:
        arguments = list(inspect.signature(mechanism).parameters.values())
    except (TypeError, ValueError):
        arguments = []
    positional = all(
        a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD) and a.default is a.empty
        for a in arguments
    )
    takes_noise = names_noise(mechanism)
    if parents is not None:
        return tuple(parents), takes_noise
    if not arguments or not positional:
        raise ValueError(
            f"parents of mechanism {mechanism!r} cannot be read from its arguments: give "
            "parents=(...), in the order of its positional arguments."
        )
    names = tuple(argument.name for argument in arguments)
    return (names[:-1] if takes_noise else names), takes_noise


@jax.tree_util.register_static
@dataclass(frozen=True)
class Argument:
    """A coefficient that is another node's value: its position among the mechanism's arguments."""

    position: int


@flax.struct.dataclass
class Linear:
    """g(bias + sum_l weight_l z_l), the prior's mechanism with a bias; build it with `linear`.

    Attributes:
        weights: one per weighted parent, () each or an Argument.
        bias: () or an Argument.
        nonlinearity: () int32, id into `mechanisms.MECHANISM_NAMES`.
        parents: names; the weighted ones come first.
    """

    weights: tuple[Any, ...]
    bias: Any
    nonlinearity: Any
    parents: tuple[str, ...] = flax.struct.field(pytree_node=False)

    def __call__(self, *values: jax.Array) -> jax.Array:
        """The value for parents (R,) each."""
        coefficients = [
            values[w.position] if isinstance(w, Argument) else w for w in (self.bias, *self.weights)
        ]
        total = jnp.asarray(coefficients[0])
        for coefficient, value in zip(coefficients[1:], values, strict=False):
            total = total + coefficient * value
        if isinstance(self.nonlinearity, (np.ndarray, np.generic)):
            return MECHANISMS[MECHANISM_NAMES[int(self.nonlinearity)]](total)
        return apply_mechanism(self.nonlinearity, total)


def linear(
    weights: Mapping[str, ArrayLike | str],
    bias: ArrayLike | str = 0.0,
    nonlinearity: str = "identity",
) -> Linear:
    """The mechanism g(bias + sum_l weight_l z_l).

    Args:
        weights: {parent: coefficient}; a coefficient is a number or the name of the node that
            holds it.
        bias: a number or the name of the node that holds it.
        nonlinearity: g, one of the prior's: identity, square, relu, tanh.

    Raises:
        ValueError: an unknown nonlinearity, or a coefficient that is not a single number.
    """
    if nonlinearity not in MECHANISM_NAMES:
        raise ValueError(
            f"nonlinearity = {nonlinearity!r}: choose from {', '.join(MECHANISM_NAMES)}."
        )
    named = [c for c in (*weights.values(), bias) if isinstance(c, str)]
    parents = tuple(dict.fromkeys((*weights, *named)))

    def coefficient(value: ArrayLike | str) -> Any:
        if isinstance(value, str):
            return Argument(parents.index(value))
        if np.shape(value) != ():
            raise ValueError(f"coefficient {value!r} must be one number or the name of a node.")
        return as_leaf(value)

    return Linear(
        weights=tuple(coefficient(weight) for weight in weights.values()),
        bias=coefficient(bias),
        nonlinearity=np.asarray(MECHANISM_NAMES.index(nonlinearity), np.int32),
        parents=parents,
    )


@flax.struct.dataclass
class Binary:
    """1 where mechanism(parents) + noise >= threshold, else 0; build it with `binary`."""

    mechanism: Any
    threshold: Any
    parents: tuple[str, ...] = flax.struct.field(pytree_node=False)

    def __call__(self, *values_and_noise: jax.Array) -> jax.Array:
        """The value for parents and noise, (R,) each."""
        *values, noise = values_and_noise
        location = self.mechanism(*values) if self.mechanism is not None else 0.0
        return (location + noise >= self.threshold).astype(jnp.float32)


def binary(
    mechanism: Callable[..., Any] | None = None,
    threshold: ArrayLike = 0.0,
    parents: tuple[str, ...] | list[str] | None = None,
) -> Binary:
    """The mechanism 1[mechanism(parents) + noise >= threshold]; None stands for the noise alone.

    Noise cannot be recovered from such a value, so counterfactuals that need it are refused.
    """
    names, takes_noise = _signature(mechanism, parents)
    if takes_noise:
        raise ValueError("binary() adds the noise itself: its mechanism takes the parents only.")
    pytree = None if mechanism is None else as_pytree(mechanism)
    return Binary(pytree, as_leaf(threshold), names)


@flax.struct.dataclass
class Constant:
    """The mechanism of a node that an intervention has set: () or (R,) values."""

    value: Any

    def __call__(self) -> jax.Array:
        """The value."""
        return jnp.asarray(self.value)
