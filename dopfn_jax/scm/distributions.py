"""Distributions of noise terms and of unknown parameters.

Anything with NumPyro's `sample(key, sample_shape)` and `log_prob(value)` will do; those made here
need no NumPyro. `normal`, `laplace`, `student_t` and `gumbel` are the prior's noise families, given
by their mean and standard deviation.
"""

import math
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dopfn_jax.scm.noise import NOISE_FAMILIES, STUDENT_T_DEGREES, sample_noise


@runtime_checkable
class Distribution(Protocol):
    """What a node's noise must offer; every NumPyro distribution does."""

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Independent draws of shape `sample_shape`."""

    def log_prob(self, value: ArrayLike) -> jax.Array:
        """Log density, elementwise."""


def is_discrete(noise: Any) -> bool:
    """Whether a distribution is over whole numbers: `bernoulli`, and what NumPyro says so of."""
    return isinstance(noise, Bernoulli) or getattr(
        getattr(noise, "support", None), "is_discrete", False
    )


def as_leaf(value: Any) -> Any:
    """`value` as float32 without touching a backend unless it already lives there."""
    return (
        value.astype(jnp.float32) if isinstance(value, jax.Array) else np.asarray(value, np.float32)
    )


@flax.struct.dataclass
class Noise:
    """One of the prior's noise families, by mean `loc` and standard deviation `scale`.

    Attributes:
        family: () int32, id into `noise.NOISE_FAMILIES`.
        loc: () mean.
        scale: () standard deviation; 1 where `scale_parent` names the node that holds it.
        families: the families that `family` may hold; others are not computed.
        scale_parent: name of the parent node whose value multiplies the noise, or "".
    """

    family: Any
    loc: Any
    scale: Any
    families: tuple[str, ...] = flax.struct.field(pytree_node=False, default=NOISE_FAMILIES)
    scale_parent: str = flax.struct.field(pytree_node=False, default="")

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Independent draws of shape `sample_shape`."""
        family = jnp.asarray(self.family)[None]
        draws = sample_noise(key, family, jnp.ones(1), math.prod(sample_shape), self.families)
        return self.loc + self.scale * draws.reshape(sample_shape)

    def log_prob(self, value: ArrayLike) -> jax.Array:
        """Log density, elementwise."""
        standard = (jnp.asarray(value) - self.loc) / self.scale
        density = jnp.zeros_like(standard)
        for name in self.families:
            is_family = jnp.asarray(self.family) == NOISE_FAMILIES.index(name)
            # Far out another family's density may be infinite, and its gradient no number.
            own = jnp.where(is_family, standard, 0.0)
            density = jnp.where(is_family, _LOG_DENSITIES[name](own), density)
        return density - jnp.log(self.scale)


def normal(loc: ArrayLike = 0.0, scale: ArrayLike | str = 1.0) -> Noise:
    """Gaussian with mean `loc`; `scale` is its standard deviation or the node that holds it."""
    return _noise("gaussian", loc, scale)


def laplace(loc: ArrayLike = 0.0, scale: ArrayLike | str = 1.0) -> Noise:
    """Laplace with mean `loc` and standard deviation `scale` (a number or a node's name)."""
    return _noise("laplace", loc, scale)


def student_t(loc: ArrayLike = 0.0, scale: ArrayLike | str = 1.0) -> Noise:
    """Student-t(3) with mean `loc` and standard deviation `scale` (a number or a node's name)."""
    return _noise("student_t", loc, scale)


def gumbel(loc: ArrayLike = 0.0, scale: ArrayLike | str = 1.0) -> Noise:
    """Gumbel with mean `loc` and standard deviation `scale` (a number or a node's name)."""
    return _noise("gumbel", loc, scale)


def _noise(family: str, loc: ArrayLike | str, scale: ArrayLike | str) -> Noise:
    family_id = np.asarray(NOISE_FAMILIES.index(family), np.int32)
    if isinstance(loc, str):
        constructor = "normal" if family == "gaussian" else family
        raise ValueError(
            f"{constructor}: loc = {loc!r}, but noise has a number as mean: put the node into the "
            f"mechanism, node(linear({{{loc!r}: 1.0}}), {constructor}(...))."
        )
    if not isinstance(scale, str):
        _require_positive(family, "scale", scale)
        return Noise(family_id, as_leaf(loc), as_leaf(scale), (family,))
    if not (isinstance(loc, (int, float)) and loc == 0):
        raise ValueError(
            f"{family} noise with loc = {loc!r} and the scale in node {scale!r}: put the mean into "
            "the mechanism, for example linear({}, bias=...), and leave loc at 0."
        )
    return Noise(family_id, as_leaf(0.0), as_leaf(1.0), (family,), scale)


def _require_numbers(family: str, **values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, str):
            remedy = "only the scale of normal, laplace, student_t and gumbel may name a node"
            if family == "bernoulli":
                remedy = "node(lambda p, noise: noise < p, uniform()) is 1 with the probability p"
            raise ValueError(f"{family}: {name} = {value!r} must be a number; {remedy}.")


def _require_positive(family: str, name: str, value: Any) -> None:
    if not isinstance(value, jax.core.Tracer) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"{family}: {name} = {value!r} must be positive.")


@flax.struct.dataclass
class HalfNormal:
    """|e| for e ~ Normal(0, scale)."""

    scale: Any

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Independent draws of shape `sample_shape`."""
        return self.scale * jnp.abs(jax.random.normal(key, sample_shape))

    def log_prob(self, value: ArrayLike) -> jax.Array:
        """Log density, elementwise; -inf below zero."""
        standard = jnp.asarray(value) / self.scale
        density = math.log(2.0) + _gaussian(standard) - jnp.log(self.scale)
        return jnp.where(standard >= 0, density, -jnp.inf)


def half_normal(scale: ArrayLike = 1.0) -> HalfNormal:
    """|e| for e ~ Normal(0, scale): the usual prior of a standard deviation."""
    _require_numbers("half_normal", scale=scale)
    _require_positive("half_normal", "scale", scale)
    return HalfNormal(as_leaf(scale))


@flax.struct.dataclass
class Uniform:
    """Uniform on [low, high)."""

    low: Any
    high: Any

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Independent draws of shape `sample_shape`."""
        return self.low + (self.high - self.low) * jax.random.uniform(key, sample_shape)

    def log_prob(self, value: ArrayLike) -> jax.Array:
        """Log density, elementwise; -inf outside."""
        inside = (jnp.asarray(value) >= self.low) & (jnp.asarray(value) <= self.high)
        return jnp.where(inside, -jnp.log(self.high - self.low), -jnp.inf)


def uniform(low: ArrayLike = 0.0, high: ArrayLike = 1.0) -> Uniform:
    """Uniform on [low, high)."""
    _require_numbers("uniform", low=low, high=high)
    if not isinstance(low, jax.core.Tracer) and not isinstance(high, jax.core.Tracer):
        _require_positive("uniform", "high - low", np.asarray(high) - np.asarray(low))
    return Uniform(as_leaf(low), as_leaf(high))


@flax.struct.dataclass
class Bernoulli:
    """1 with `probability`, else 0."""

    probability: Any

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Independent draws of shape `sample_shape`, float32."""
        return jax.random.bernoulli(key, self.probability, sample_shape).astype(jnp.float32)

    def log_prob(self, value: ArrayLike) -> jax.Array:
        """Log probability of 0 or 1, elementwise; -inf of anything else."""
        value = jnp.asarray(value)
        mass = jnp.where(value == 1, jnp.log(self.probability), jnp.log1p(-self.probability))
        return jnp.where((value == 0) | (value == 1), mass, -jnp.inf)


def bernoulli(probability: ArrayLike = 0.5) -> Bernoulli:
    """1 with `probability`, else 0."""
    _require_numbers("bernoulli", probability=probability)
    if not isinstance(probability, jax.core.Tracer):
        inside = (np.asarray(probability) >= 0) & (np.asarray(probability) <= 1)
        if not np.all(inside):
            raise ValueError(f"bernoulli: probability = {probability!r} must lie in [0, 1].")
    return Bernoulli(as_leaf(probability))


@flax.struct.dataclass
class Empirical:
    """Uniform over the (R,) `values`: the residuals of a fit, drawn with replacement."""

    values: Any

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Independent draws of shape `sample_shape`."""
        return jax.random.choice(key, jnp.asarray(self.values), sample_shape)

    def log_prob(self, value: ArrayLike) -> jax.Array:
        """Refused: observed residuals have no density."""
        raise ValueError(
            "noise that resamples observed residuals has no density: give the node a family "
            "such as normal() where a likelihood is needed."
        )


def empirical(values: ArrayLike) -> Empirical:
    """Uniform over the (R,) `values`."""
    return Empirical(as_leaf(values))


def _gaussian(x: jax.Array) -> jax.Array:
    return -0.5 * x**2 - 0.5 * math.log(2 * math.pi)


def _laplace(x: jax.Array) -> jax.Array:
    return -math.sqrt(2) * jnp.abs(x) - 0.5 * math.log(2)


def _student_t(x: jax.Array) -> jax.Array:
    nu = STUDENT_T_DEGREES
    stretch = math.sqrt(nu / (nu - 2))
    return jax.scipy.stats.t.logpdf(x * stretch, nu) + math.log(stretch)


def _gumbel(x: jax.Array) -> jax.Array:
    stretch = math.pi / math.sqrt(6)
    g = x * stretch + float(np.euler_gamma)
    return -(g + jnp.exp(-g)) + math.log(stretch)


_LOG_DENSITIES = {
    "gaussian": _gaussian,
    "laplace": _laplace,
    "student_t": _student_t,
    "gumbel": _gumbel,
}
