"""The optimiser: AdamW or Muon, warm-up and cosine, gradient clipping."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from optax.contrib import MuonDimensionNumbers, muon

from dopfn_jax.config import TrainingConfig

# Learning rate of what Muon leaves to Adam (embeddings, head, norms), relative to Muon's.
ADAM_SHARE = 0.5


@flax.struct.dataclass
class Schedule:
    """Learning rate of a step: a linear warm-up, then a cosine.

    A pytree, so that one compiled train step serves every schedule.

    Attributes:
        peak: () float32, at the end of the warm-up.
        final: () float32, from step `steps` on.
        warmup: () float32, steps.
        steps: () float32, of warm-up and cosine together.
    """

    peak: jax.Array
    final: jax.Array
    warmup: jax.Array
    steps: jax.Array

    def __call__(self, step: ArrayLike) -> jax.Array:
        """() float32, the rate of the update after `step` others."""
        step = jnp.asarray(step, jnp.float32)
        # No division by zero where there is no warm-up.
        risen = step / jnp.maximum(self.warmup, 1.0)
        share = jnp.clip((step - self.warmup) / (self.steps - self.warmup), 0.0, 1.0)
        cosine = self.final + (self.peak - self.final) * 0.5 * (1.0 + jnp.cos(jnp.pi * share))
        return jnp.where(step < self.warmup, self.peak * risen, cosine)


def make_schedule(config: TrainingConfig) -> Schedule:
    """From 0 to `learning_rate` and on to `final_learning_rate_share` of it at step `steps`."""
    peak = config.learning_rate
    warmup = min(config.warmup_steps, config.steps // 2)
    values = (peak, peak * config.final_learning_rate_share, warmup, config.steps)
    return Schedule(*(jnp.float32(value) for value in values))


def make_optimizer(
    config: TrainingConfig, schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """AdamW, or Muon for the matrices of the layers with Adam for everything else.

    Args:
        config: which, and its settings.
        schedule: the config's own by default.
    """
    schedule = make_schedule(config) if schedule is None else schedule
    if config.optimizer == "muon":
        update = muon(
            schedule,
            weight_decay=config.weight_decay,
            adam_learning_rate=lambda count: ADAM_SHARE * schedule(count),
            muon_weight_dimension_numbers=_layer_matrices,
        )
    else:
        update = optax.adamw(schedule, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _layer_matrices(params: Any) -> Any:
    """Muon's (input, output) axes for the stacked matrices of the layers, None for all others."""

    def of(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers | None:
        is_layer = path[0] == jax.tree_util.DictKey("layers")
        return MuonDimensionNumbers(-2, -1) if is_layer and leaf.ndim == 3 else None

    return jax.tree_util.tree_map_with_path(of, params)
