"""The bar distribution: a piecewise-constant density on the y axis with half-normal tails.

The "Riemann distribution" of Müller et al., Transformers Can Do Bayesian Inference (ICLR 2022): Q
buckets with fixed borders and one logit each. Inner buckets are uniform. The mass of the first and
of the last bucket is spread as a half-normal from that bucket's inner border outwards to infinity,
half of it within the bucket's width.

Axes: Q buckets, S samples or probability levels, `batch` any leading axes of the logits.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dopfn_jax.model.standardise import compress, expand

# Standard deviations: no row of a context of 2,026 rows lies farther from its mean.
FARTHEST = 45.0
# |Z| of a standard normal Z has this median: a tail's scale is its bucket's width over it.
_HALF_NORMAL_MEDIAN = 0.6744897501960817
_HALF_NORMAL_MEAN = math.sqrt(2 / math.pi)
_HALF_NORMAL_VARIANCE = 1 - 2 / math.pi
_HALF_NORMAL_ENTROPY = 0.5 * math.log(math.pi * math.e / 2)
# The integral over z > 0 of P(|Z| > z) squared.
_HALF_NORMAL_SURVIVAL_SQUARED = (2 * math.sqrt(2) - 2) / math.sqrt(math.pi)
# Log of (half-normal density at its peak) over (uniform density of the same bucket).
_LOG_PEAK = math.log(_HALF_NORMAL_MEDIAN * _HALF_NORMAL_MEAN)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BarDistribution:
    """A batch of bar distributions that share their borders.

    A pytree: it passes through `jax.jit` and `jax.vmap`. Borders that differ between tasks carry
    leading axes; the methods want one row of borders, so call them inside a `jax.vmap`.

    Methods that take y accept the shape `samples + batch`, samples being any leading axes, or one
    that broadcasts to it, such as a scalar; they return `samples + batch`.

    Attributes:
        logits: (*batch, Q) unnormalised log-masses of the buckets, of any float type.
        borders: (Q + 1,) float32, strictly increasing, in the units of y; Q >= 3.
    """

    logits: jax.Array
    borders: jax.Array

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the logits without the bucket axis."""
        return self.logits.shape[:-1]

    @property
    def log_masses(self) -> jax.Array:
        """Log-probability of each bucket, (*batch, Q), in the type of the borders."""
        if (
            self.borders.ndim != 1
            or self.borders.shape[0] != self.logits.shape[-1] + 1
            or self.logits.shape[-1] < 3
        ):
            raise ValueError(
                f"borders of shape {self.borders.shape} do not fit logits of shape "
                f"{self.logits.shape}: they must be (Q + 1,) and (*batch, Q) with Q >= 3; where "
                "borders have leading axes, use jax.vmap over them."
            )
        return jax.nn.log_softmax(self.logits.astype(self.borders.dtype))

    @property
    def masses(self) -> jax.Array:
        """Probability of each bucket, (*batch, Q)."""
        return jnp.exp(self.log_masses)

    def log_prob(self, y: ArrayLike) -> jax.Array:
        """Log-density at y, per unit of y.

        Finite, with finite gradients in the logits and in y, up to about 1e18 tail scales out.

        Args:
            y: samples + batch.

        Returns:
            samples + batch, the logarithm of a density in 1 / (units of y).
        """
        log_masses, log_peaks = self.log_masses, self._log_peaks

        def at(y: jax.Array) -> jax.Array:
            index = self._bucket_of(y)
            lower, upper = self._tail_depths(y)
            log_mass = jnp.take_along_axis(log_masses, index, axis=-1)
            return log_mass + log_peaks[index] - 0.5 * (jnp.square(lower) + jnp.square(upper))

        return self._map_samples(at, y)

    def prob(self, y: ArrayLike) -> jax.Array:
        """Density at y; shapes as in `log_prob`."""
        return jnp.exp(self.log_prob(y))

    def cdf(self, y: ArrayLike) -> jax.Array:
        """P(Y <= y).

        Args:
            y: samples + batch.

        Returns:
            samples + batch, in [0, 1].
        """
        masses = self.masses
        below = _cumulative(masses)
        last = masses.shape[-1] - 1

        def at(y: jax.Array) -> jax.Array:
            index = self._bucket_of(y)
            lower, upper = self._tail_depths(y)
            inner = (y - self.borders[index]) / self._widths[index]
            share = jnp.where(index == 0, jax.lax.erfc(lower / math.sqrt(2)), inner)
            start, mass = (jnp.take_along_axis(a, index, axis=-1) for a in (below, masses))
            above = mass * jax.lax.erfc(upper / math.sqrt(2))
            return jnp.where(index == last, 1 - above, jnp.minimum(start + mass * share, 1))

        return self._map_samples(at, y)

    def quantile(self, q: ArrayLike) -> jax.Array:
        """The inverse of `cdf`.

        Levels above one half are counted from the upper end, so both tails keep the precision of q
        and of 1 - q.

        Args:
            q: a probability, or a 1-D array of S of them; exactly 0 gives -inf, exactly 1 inf.

        Returns:
            batch for a scalar q, batch + (S,) for a 1-D q, in units of y.

        Raises:
            ValueError: q has more than one axis.
        """
        q = jnp.asarray(q, self.borders.dtype)
        if q.ndim > 1:
            raise ValueError(f"q has shape {q.shape}, but must be a scalar or 1-D: ravel it.")
        y = self._quantile(jnp.broadcast_to(q, (*self.batch_shape, q.size)))
        return y[..., 0] if q.ndim == 0 else y

    @property
    def median(self) -> jax.Array:
        """The 0.5 quantile, shape batch, in units of y."""
        return self.quantile(0.5)

    @property
    def mean(self) -> jax.Array:
        """Expectation, shape batch, in units of y."""
        return jnp.sum(self.masses * _lift(self._bucket_means, self.logits.ndim), axis=-1)

    @property
    def variance(self) -> jax.Array:
        """Variance, shape batch, in squared units of y."""
        masses = self.masses
        within = jnp.square(self._widths[1:-1]) / 12
        tails = _HALF_NORMAL_VARIANCE * jnp.square(self._tail_scales)
        within = jnp.concatenate([tails[:1], within, tails[1:]])
        between = jnp.square(_lift(self._bucket_means, self.logits.ndim) - self.mean[..., None])
        return jnp.sum(masses * (_lift(within, self.logits.ndim) + between), axis=-1)

    @property
    def mode(self) -> jax.Array:
        """Where the density is highest, shape batch, in units of y.

        The middle of the bucket with the highest density; for a tail its inner border, where a
        half-normal peaks.
        """
        peaks = jnp.concatenate([self.borders[1:2], self._inner_middles, self.borders[-2:-1]])
        log_densities = self.log_masses + _lift(self._log_peaks, self.logits.ndim)
        return peaks[jnp.argmax(log_densities, axis=-1)]

    @property
    def entropy(self) -> jax.Array:
        """Differential entropy, shape batch, in nats (y in its own units)."""
        log_masses = self.log_masses
        masses = jnp.exp(log_masses)
        surprise = -jnp.where(masses > 0, log_masses, 0)
        tails = _HALF_NORMAL_ENTROPY + jnp.log(self._tail_scales)
        within = jnp.concatenate([tails[:1], jnp.log(self._widths[1:-1]), tails[1:]])
        return jnp.sum(masses * (surprise + _lift(within, self.logits.ndim)), axis=-1)

    def crps(self, y: ArrayLike) -> jax.Array:
        """Continuous ranked probability score at y; lower is better.

        The integral over x of (cdf(x) - 1{x >= y}) squared. Exact, as E|Y - y| - E|Y - Y'| / 2
        (Gneiting and Raftery, 2007, equation 21). Needs memory for samples + batch + (Q,).

        Args:
            y: samples + batch.

        Returns:
            samples + batch, in units of y.
        """
        masses = self.masses

        def at(y: jax.Array) -> jax.Array:
            expected_distance = jnp.sum(masses[..., None, :] * self._bucket_distances(y), axis=-1)
            return expected_distance - self._half_mean_difference[..., None]

        return self._map_samples(at, y)

    def sample(self, key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
        """Draws independent samples.

        Args:
            key: a random key.
            shape: the sample shape.

        Returns:
            shape + batch, in units of y; always finite.
        """
        # Levels are multiples of 2**-23 moved off zero by half a step, so that no draw is infinite.
        level = jax.random.uniform(
            key, shape + self.batch_shape, self.borders.dtype, minval=2.0**-24
        )
        return self._map_samples(self._quantile, level)

    def affine(self, loc: ArrayLike, scale: ArrayLike) -> "BarDistribution":
        """The distribution of loc + scale * Y, for example to undo a standardisation.

        Args:
            loc: a scalar, in the new units; for one value per task use `jax.vmap`. The narrowest
                bucket must stay wider than the float32 spacing at loc.
            scale: a positive scalar, in new units per unit of y.

        Raises:
            ValueError: loc or scale is not a scalar, or scale is known not to be positive.
        """
        if not isinstance(scale, jax.core.Tracer) and not np.all(np.asarray(scale) > 0):
            raise ValueError(f"scale is {scale!r}, but must be positive: mirror outcomes yourself.")
        loc, scale = (jnp.asarray(a, self.borders.dtype) for a in (loc, scale))
        if loc.ndim or scale.ndim:
            raise ValueError(
                f"loc has shape {loc.shape} and scale {scale.shape}, but both must be scalars: the "
                "batch shares its borders; use jax.vmap for one value per task."
            )
        return BarDistribution(self.logits, loc + scale * self.borders)

    def average(self, axis: int = 0) -> "BarDistribution":
        """The equal-weight mixture over a batch axis, for example over the members of an ensemble.

        Args:
            axis: the batch axis to average over, counted from the front.

        Returns:
            A distribution without that axis whose logits are log-probabilities.

        Raises:
            ValueError: axis is not a batch axis.
        """
        if not 0 <= axis < len(self.batch_shape):
            raise ValueError(
                f"axis is {axis}, but must index the batch shape {self.batch_shape} from the front."
            )
        log_sum = jax.nn.logsumexp(self.log_masses, axis=axis)
        return BarDistribution(log_sum - math.log(self.batch_shape[axis]), self.borders)

    @property
    def _widths(self) -> jax.Array:
        return jnp.diff(self.borders)

    @property
    def _tail_scales(self) -> jax.Array:
        """Scales of the lower and of the upper half-normal, (2,)."""
        return self._widths[jnp.array([0, -1])] / _HALF_NORMAL_MEDIAN

    @property
    def _inner_middles(self) -> jax.Array:
        return (self.borders[1:-2] + self.borders[2:-1]) / 2

    @property
    def _log_peaks(self) -> jax.Array:
        """Log of each bucket's highest density given the bucket, (Q,)."""
        log_heights = -jnp.log(self._widths)
        return jnp.concatenate(
            [log_heights[:1] + _LOG_PEAK, log_heights[1:-1], log_heights[-1:] + _LOG_PEAK]
        )

    @property
    def _bucket_means(self) -> jax.Array:
        """Mean of y within each bucket, (Q,)."""
        lower, upper = _HALF_NORMAL_MEAN * self._tail_scales[:, None]
        return jnp.concatenate(
            [self.borders[1:2] - lower, self._inner_middles, self.borders[-2:-1] + upper]
        )

    @property
    def _half_mean_difference(self) -> jax.Array:
        """Half of E|Y - Y'|, which is the integral of cdf (1 - cdf), shape batch."""
        masses = self.masses
        cdf = _cumulative(masses)[..., 1:]
        low, high = cdf[..., :-2], cdf[..., 1:-1]
        inner = (low + high) / 2 - (low * low + low * high + high * high) / 3
        inner = jnp.sum(inner * _lift(self._widths[1:-1], inner.ndim), axis=-1)
        tails = jnp.stack([masses[..., 0], masses[..., -1]], axis=-1)
        tails = tails * _HALF_NORMAL_MEAN - jnp.square(tails) * _HALF_NORMAL_SURVIVAL_SQUARED
        return inner + jnp.sum(tails * _lift(self._tail_scales, tails.ndim), axis=-1)

    def _bucket_distances(self, y: jax.Array) -> jax.Array:
        """E[|Y - y| given Y's bucket], (*batch, S) -> (*batch, S, Q)."""
        middles = _lift(self._inner_middles, y.ndim + 1)
        widths = _lift(self._widths[1:-1], y.ndim + 1)
        distance = jnp.abs(y[..., None] - middles)
        inside = jnp.minimum(distance, widths / 2)
        inner = distance - inside + jnp.square(inside) / widths + widths / 4

        inner_borders = _lift(jnp.stack([self.borders[1], self.borders[-2]]), y.ndim + 1)
        scales = _lift(self._tail_scales, y.ndim + 1)
        outwards = _lift(jnp.array([-1, 1], y.dtype), y.ndim + 1)
        depth = outwards * (y[..., None] - inner_borders) / scales
        inside = jnp.maximum(depth, 0)
        # The mean of max(|Z| - inside, 0) for a standard normal Z.
        excess = _HALF_NORMAL_MEAN * jnp.exp(-0.5 * jnp.square(inside))
        excess = excess - inside * jax.lax.erfc(inside / math.sqrt(2))
        tails = scales * (2 * excess - _HALF_NORMAL_MEAN + 2 * inside - depth)
        return jnp.concatenate([tails[..., :1], inner, tails[..., 1:]], axis=-1)

    def _bucket_of(self, y: jax.Array) -> jax.Array:
        """Index of the bucket that holds y; the first and the last hold all outside the borders."""
        return jnp.searchsorted(self.borders[1:-1], y, side="right")

    def _tail_depths(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """How deep y lies in the lower and in the upper tail, in scales; 0 outside the tail."""
        lower = (self.borders[1] - y) / self._tail_scales[0]
        upper = (y - self.borders[-2]) / self._tail_scales[1]
        return jnp.maximum(lower, 0), jnp.maximum(upper, 0)

    def _quantile(self, q: jax.Array) -> jax.Array:
        """Quantiles at levels q, (*batch, S) -> (*batch, S)."""
        masses = self.masses
        from_below, from_above = jax.vmap(_lower_quantile)(
            jnp.stack([masses, masses[..., ::-1]]),
            jnp.stack([self.borders, -self.borders[::-1]]),
            jnp.minimum(jnp.stack([q, 1 - q]), 0.5),
        )
        return jnp.where(q <= 0.5, from_below, -from_above)

    def _map_samples(self, function: Callable[[jax.Array], jax.Array], y: ArrayLike) -> jax.Array:
        """Calls a function of (*batch, S) on y of shape samples + batch, and returns that shape."""
        y = jnp.asarray(y, self.borders.dtype)
        samples = y.shape[: max(y.ndim - len(self.batch_shape), 0)]
        y = jnp.broadcast_to(y, samples + self.batch_shape)
        y = y.reshape((math.prod(samples), *self.batch_shape))
        result = jnp.moveaxis(function(jnp.moveaxis(y, 0, -1)), -1, 0)
        return result.reshape(samples + self.batch_shape)


def fit_borders(samples: ArrayLike, buckets: int, uniform_share: float = 0.0) -> jax.Array:
    """Chooses bucket borders of standardised y.

    Runs on the host. Some inner borders are quantiles of samples at equally spaced probabilities,
    fine where outcomes are frequent; the others are equally spaced on the axis of `compress` out to
    FARTHEST standard deviations: of one width up to LINEAR_RANGE, widening in proportion beyond.
    Without those the few rows far out, which decide a mean squared error, would share one bucket.

    Equal borders, which samples with atoms produce, are moved apart by at least 1e-4 of an equal
    share of the range. The outermost borders, which set the scales of the tails, are the quantiles
    at 0.1 / Q and 1 - 0.1 / Q, because a half-normal is lighter than the tails of many standardised
    outcomes; where that leaves no room beyond the equally spaced borders, FARTHEST / 2 more.

    Args:
        samples: 1-D standardised outcomes.
        buckets: Q, at least 3.
        uniform_share: the share of the inner borders, in [0, 1], that is equally spaced on the
            axis of `compress`.

    Returns:
        (Q + 1,) float32, strictly increasing.

    Raises:
        ValueError: an argument is out of range, or the samples are not 1-D, not finite, or (nearly)
            all equal.
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim != 1 or samples.size == 0 or not np.isfinite(samples).all():
        raise ValueError(f"samples of shape {samples.shape} must be 1-D, finite and not empty.")
    if buckets < 3:
        raise ValueError(
            f"buckets is {buckets}, but must be at least 3: two tails and an inner bucket."
        )
    if not 0 <= uniform_share <= 1:
        raise ValueError(f"uniform_share is {uniform_share}, but must lie in [0, 1].")

    lowest, highest = np.quantile(samples, [0.1 / buckets, 1 - 0.1 / buckets])
    if lowest == highest:
        raise ValueError(f"samples (nearly) all equal {lowest}: borders need samples that vary.")
    uniform = round(uniform_share * (buckets - 1))
    probabilities = np.linspace(0, 1, buckets - uniform + 1)[1:-1]
    farthest = compress(jnp.float32(FARTHEST))
    evenly = expand(jnp.linspace(-farthest, farthest, uniform))
    inner = np.concatenate([np.quantile(samples, probabilities), np.asarray(evenly, np.float64)])

    share = (highest - lowest) / buckets
    gap = max(1e-4 * share, 4 * float(np.finfo(np.float32).eps) * np.abs(inner).max())
    steps = gap * np.arange(buckets - 1)
    inner = np.maximum.accumulate(np.sort(inner) - steps) + steps
    room = FARTHEST / 2 if uniform else share / 2
    borders = np.concatenate(
        [[min(lowest, inner[0] - room)], inner, [max(highest, inner[-1] + room)]]
    )
    return jnp.asarray(borders, jnp.float32)


def _lift(values: jax.Array, ndim: int) -> jax.Array:
    """Adds leading axes of size 1, up to ndim axes: broadcasting without implicit promotion."""
    return values.reshape((1,) * (ndim - values.ndim) + values.shape)


def _cumulative(masses: jax.Array) -> jax.Array:
    """Mass below each bucket, and then of all: (*batch, Q) -> (*batch, Q + 1)."""
    return jnp.cumsum(jnp.pad(masses, [(0, 0)] * (masses.ndim - 1) + [(1, 0)]), axis=-1)


def _lower_quantile(masses: jax.Array, borders: jax.Array, q: jax.Array) -> jax.Array:
    """Quantiles at levels q <= 0.5, counted from the lower end.

    Shapes: (*batch, Q), (Q + 1,), (*batch, S) -> (*batch, S).
    """
    lower_scale, upper_scale = jnp.diff(borders)[jnp.array([0, -1])] / _HALF_NORMAL_MEDIAN
    last = masses.shape[-1] - 1

    def of_one(masses: jax.Array, q: jax.Array) -> jax.Array:
        below = _cumulative(masses)
        index = jnp.searchsorted(below[1:-1], q, side="left")
        mass = masses[index]
        share = jnp.clip((q - below[index]) / jnp.where(mass > 0, mass, 1), 0, 1)
        inner = borders[index] + share * (borders[index + 1] - borders[index])
        # In the tails only: elsewhere it may be infinite, which would make gradients NaN.
        tail = jnp.where(index == 0, share, jnp.where(index == last, 1 - share, 0.5))
        depth = -jax.scipy.special.ndtri(tail / 2)
        in_first = borders[1] - lower_scale * depth
        in_last = borders[-2] + upper_scale * depth
        return jnp.where(index == 0, in_first, jnp.where(index == last, in_last, inner))

    return jnp.vectorize(of_one, signature="(q),(s)->(s)")(masses, q)
