"""The optimiser: AdamW or Muon, warm-up and cosine, gradient clipping."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from dopfn_jax.config import TrainingConfig

# Learning rate of what Muon leaves to Adam (embeddings, head, norms), relative to Muon's.
ADAM_SHARE = 0.5


def make_schedule(config: TrainingConfig) -> optax.Schedule:
    """Linear warm-up, then a cosine to `final_learning_rate_share` of the peak at step `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(config.warmup_steps, config.steps // 2),
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_learning_rate_share,
    )


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW, or Muon for the matrices of the layers with Adam for everything else."""
    schedule = make_schedule(config)
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
