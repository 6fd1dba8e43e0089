"""Configuration: frozen dataclasses that validate themselves, kept as TOML and JSON."""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from dopfn_jax.config_files import ConfigError as ConfigError
from dopfn_jax.config_files import build, merge, parse_override, read_toml
from dopfn_jax.config_files import preset_names as preset_names
from dopfn_jax.scm.case_studies import CASE_STUDIES
from dopfn_jax.scm.mechanisms import MECHANISMS
from dopfn_jax.scm.noise import NOISE_FAMILIES
from dopfn_jax.wide.assignments import ASSIGNMENTS
from dopfn_jax.wide.columns import COLUMN_KINDS, OUTCOME_KINDS
from dopfn_jax.wide.effects import EFFECTS, LINKS
from dopfn_jax.wide.graphs import GRAPHS
from dopfn_jax.wide.mechanisms import MECHANISMS as WIDE_MECHANISMS

# The parts that each field of WidePriorConfig may name.
_WIDE_PARTS: dict[str, typing.Iterable[str]] = {
    "graphs": GRAPHS,
    "mechanisms": WIDE_MECHANISMS,
    "noise_families": NOISE_FAMILIES,
    "column_kinds": COLUMN_KINDS,
    "assignments": ASSIGNMENTS,
    "effects": EFFECTS,
    "links": LINKS,
    "outcome_kinds": OUTCOME_KINDS,
}


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{name} = {value!r}: {remedy}")


def _require_known(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    _require(len(values) > 0, name, values, f"give at least one of {', '.join(known)}")
    for value in values:
        _require(value in known, name, value, f"choose from {', '.join(known)}")


def _require_at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(least <= value < math.inf, name, value, f"must be {least} or more, and finite")


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 < value < math.inf, name, value, "must be positive and finite")


def _require_share(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value <= 1, name, value, "is a share: between 0 and 1")


@dataclass(frozen=True)
class PriorConfig:
    """The distribution over SCMs and tables (Do-PFN, Algorithm 1 and Appendix C.1)."""

    # Nodes of the graph, treatment and outcome included: K ~ Uniform{min_nodes, ..., max_nodes}.
    min_nodes: int = 4
    max_nodes: int = 10
    # Hidden nodes: U ~ Uniform{0, ..., min(max_hidden, K - 3)}.
    max_hidden: int = 3
    # A fixed graph by name instead of random ones ("" = random); fixes the node numbers too.
    case_study: str = ""
    # Nonlinearities, drawn uniformly per node.
    mechanisms: tuple[str, ...] = ("square", "relu", "tanh", "identity")
    # Additive noise, one family per node, drawn uniformly.
    noise_families: tuple[str, ...] = ("gaussian",)
    # Standard deviation of the roots: Uniform(low, high) per task.
    root_scale: tuple[float, float] = (1.0, 3.0)
    # Standard deviation of all other nodes: noise_scale * Beta(1, 5) per task.
    noise_scale: float = 0.3
    # Share of tasks whose outcome does not descend from the treatment.
    zero_effect_share: float = 0.05
    # "interventional": queries ask y under do(t), t a coin flip. "observational": as observed.
    target: Literal["interventional", "observational"] = "interventional"

    def __post_init__(self) -> None:
        _require(
            self.min_nodes >= 2,
            "min_nodes",
            self.min_nodes,
            "must be 2 or more, for a treatment and an outcome",
        )
        _require(
            self.max_nodes >= self.min_nodes,
            "max_nodes",
            self.max_nodes,
            f"must be at least min_nodes = {self.min_nodes}",
        )
        _require_at_least(self, 0, "max_hidden")
        if self.case_study:
            _require_known("case_study", [self.case_study], list(CASE_STUDIES))
        _require_known("mechanisms", self.mechanisms, list(MECHANISMS))
        _require_known("noise_families", self.noise_families, NOISE_FAMILIES)
        low, high = self.root_scale
        _require(
            0 < low <= high < math.inf,
            "root_scale",
            self.root_scale,
            "needs 0 < low <= high, both finite",
        )
        _require(
            0 <= self.noise_scale < math.inf,
            "noise_scale",
            self.noise_scale,
            "must be 0 or more, and finite",
        )
        _require_share(self, "zero_effect_share")

    @property
    def nodes(self) -> int:
        """Array size of the node axis K."""
        return len(CASE_STUDIES[self.case_study].nodes) if self.case_study else self.max_nodes

    @property
    def covariates(self) -> int:
        """Array size of the covariate axis F: the most covariates that a task shows."""
        return len(CASE_STUDIES[self.case_study].shown) if self.case_study else self.max_nodes - 2


@dataclass(frozen=True)
class WidePriorConfig:
    """The distribution over tables like those of ordinary observational studies.

    A name that is listed twice is drawn twice as often.
    """

    # Families of the graph of pre-treatment nodes.
    graphs: tuple[str, ...] = ("erdos_renyi", "scale_free", "layered", "block", "factors")
    # Expected number of a node's parents: log-uniform.
    density: tuple[float, float] = (1.0, 8.0)
    mechanisms: tuple[str, ...] = (
        "linear",
        "linear",
        "linear",
        "linear",
        "square",
        "relu",
        "tanh",
        "sine",
        "product",
        "mlp",
        "tree",
    )
    noise_families: tuple[str, ...] = NOISE_FAMILIES
    column_kinds: tuple[str, ...] = (
        "continuous",
        "continuous",
        "continuous",
        "binary",
        "binary",
        "ordinal",
        "categorical",
        "skewed",
        "heavy_tailed",
        "zero_inflated",
    )
    # Share of tasks with 1 to `max_hidden` nodes that are not shown. In the others all nodes are
    # shown only if `duplicate_share` and `post_treatment_share` are 0 too.
    hidden_share: float = 0.2
    max_hidden: int = 6
    # Share of tasks with 1 to `max_post_treatment` nodes after the treatment.
    post_treatment_share: float = 0.15
    max_post_treatment: int = 4
    assignments: tuple[str, ...] = ("logistic", "logistic", "logistic", "threshold", "coin")
    # How strongly the score decides a logistic assignment: log-uniform.
    steepness: tuple[float, float] = (0.1, 8.0)
    # The wanted share of treated units is kept within these bounds; assignments may miss it.
    treated_rate: tuple[float, float] = (0.02, 0.98)
    # Share of tasks whose treatment follows the expected outcome, more or less.
    prognostic_share: float = 0.4
    effects: tuple[str, ...] = ("zero", "constant", "constant", "varying", "varying", "varying")
    # Average effect in standard deviations of the baseline: log-uniform, of random sign.
    effect_size: tuple[float, float] = (0.05, 3.0)
    # Applied to baseline plus effect: all but "identity" make them interact.
    links: tuple[str, ...] = (
        "identity",
        "identity",
        "identity",
        "identity",
        "identity",
        "tanh",
        "exponential",
        "square",
        "relu",
    )
    outcome_kinds: tuple[str, ...] = (
        "continuous",
        "continuous",
        "continuous",
        "continuous",
        "continuous",
        "binary",
        "binary",
        "skewed",
        "count",
        "zero_inflated",
    )
    # Share of tasks whose outcome is multiplied by -1, so that effects are as often negative.
    mirrored_share: float = 0.5
    # Standard deviation of the outcome's noise, as a multiple of its signal's: log-uniform.
    noise_ratio: tuple[float, float] = (0.05, 8.0)
    heteroscedastic_share: float = 0.3
    missing_share: float = 0.2
    # Share of tasks with duplicated columns; each replaces another, whose node is then hidden.
    duplicate_share: float = 0.1

    def __post_init__(self) -> None:
        for name, known in _WIDE_PARTS.items():
            _require_known(name, getattr(self, name), list(known))
        _require_at_least(self, 1, "max_hidden", "max_post_treatment")
        for name in ("density", "steepness", "effect_size", "noise_ratio", "treated_rate"):
            low, high = getattr(self, name)
            _require(
                0 < low <= high < math.inf, name, (low, high), "needs 0 < low <= high, both finite"
            )
        _require(self.treated_rate[1] < 1, "treated_rate", self.treated_rate, "must be below 1")
        _require_share(
            self,
            "hidden_share",
            "post_treatment_share",
            "prognostic_share",
            "mirrored_share",
            "heteroscedastic_share",
            "missing_share",
            "duplicate_share",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The transformer and its bar distribution."""

    width: int = 192
    layers: int = 12
    heads: int = 6
    # Hidden width of the MLP, as a multiple of `width`.
    mlp_ratio: int = 4
    # Covariates per token: 1 = a token per cell; g = groups of g columns; 0 = one token per row.
    features_per_token: int = 1
    # Whether rows also carry the predictions of two ridge regressions of the context.
    linear_fit: bool = False
    # Whether what these predict also moves the answers without passing through the layers.
    linear_tilt: bool = False
    # Buckets of the bar distribution.
    buckets: int = 100
    # Share of bucket borders spaced evenly, far out in proportion to y, not by quantiles of y.
    uniform_border_share: float = 0.0
    # Arithmetic of the layers; parameters and the bar distribution stay in float32.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    # Recompute each layer in the backward pass: less memory, a third more arithmetic.
    remat: bool = False

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "width", "layers", "heads", "mlp_ratio")
        _require(
            self.width % self.heads == 0, "heads", self.heads, f"must divide width = {self.width}"
        )
        _require(
            self.features_per_token >= 0,
            "features_per_token",
            self.features_per_token,
            "use 1 for a token per cell, g for groups of g columns, 0 for one token per row",
        )
        _require(
            self.linear_fit or not self.linear_tilt,
            "linear_tilt",
            self.linear_tilt,
            "needs linear_fit = true",
        )
        _require_at_least(self, 4, "buckets")
        _require(
            0 <= self.uniform_border_share < 1,
            "uniform_border_share",
            self.uniform_border_share,
            "is a share: at least 0, below 1",
        )


@dataclass(frozen=True)
class TableShape:
    """One compiled shape of a training step: `tasks` tables of `rows` rows.

    Each table draws its context size uniformly from the closed interval `context`; its other rows
    are queries.
    """

    rows: int
    context: tuple[int, int]
    tasks: int
    # How often this shape is drawn, relative to the others.
    weight: float = 1.0
    # Columns of a table of the wide prior: log-uniform in this closed interval. (0, 0): the table
    # comes from the paper's prior, which has its own numbers.
    covariates: tuple[int, int] = (0, 0)
    # Not drawn before this step of a run: short tables teach more in the same time at first.
    first_step: int = 0

    @property
    def wide(self) -> bool:
        """Whether these tables come from the wide prior."""
        return self.covariates != (0, 0)

    def __post_init__(self) -> None:
        low, high = self.context
        _require(
            2 <= low <= high < self.rows,
            "context",
            self.context,
            f"needs 2 <= low <= high < rows = {self.rows} (at least one query row)",
        )
        _require_at_least(self, 1, "tasks")
        _require_at_least(self, 0, "first_step")
        _require_positive(self, "weight")
        fewest, most = self.covariates
        _require(
            not self.wide or 1 <= fewest <= most,
            "covariates",
            self.covariates,
            "needs 1 <= fewest <= most, or (0, 0) for the paper's prior",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation, schedule and bookkeeping of a run."""

    steps: int = 100_000
    seed: int = 0
    # The shape of step k is drawn from these, as a function of (seed, k) alone.
    shapes: tuple[TableShape, ...] = (TableShape(rows=2200, context=(10, 2199), tasks=8),)
    # Weight of the loss of effects beside the negative log-likelihood. Above 0, half as many query
    # rows are asked about, each under both treatments.
    effect_weight: float = 0.0
    # Weight of the loss of each task's average effect; needs `effect_weight` above 0.
    average_effect_weight: float = 0.0
    # Outcomes per query row of the wide prior that the likelihood averages over, each with its own
    # draw of the outcome's noise: the same loss on average, with less noise in its gradient.
    outcome_draws: int = 1
    # Parts that a batch is computed in, one after another: the same update in less memory.
    accumulate: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 1000
    # Learning rate at the end of the cosine, as a share of its peak.
    final_learning_rate_share: float = 0.02
    weight_decay: float = 0.01
    # Gradients are scaled down to this global norm.
    clip_norm: float = 1.0
    # Decay of the moving average of the parameters that is evaluated and exported (0 = off).
    ema_decay: float = 0.999
    log_every: int = 20
    # Steps between evaluations on fixed held-out tasks of the prior (0 = only at the end).
    validate_every: int = 500
    validation: TableShape = TableShape(rows=256, context=(192, 192), tasks=256)
    # Minutes between checkpoints; one more is always written at the end.
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "steps", "accumulate", "log_every", "outcome_draws")
        _require_at_least(self, 0, "seed", "warmup_steps", "validate_every", "weight_decay")
        # Of a larger one JAX would take the last 32 bits, which may be another's.
        _require(self.seed < 2**32, "seed", self.seed, "must be below 2 ** 32")
        _require_at_least(self, 0, "checkpoint_minutes", "effect_weight", "average_effect_weight")
        _require(
            self.effect_weight > 0 or not self.average_effect_weight,
            "average_effect_weight",
            self.average_effect_weight,
            "needs effect_weight above 0, for which rows are asked under both treatments",
        )
        _require_positive(self, "learning_rate", "clip_norm")
        for shape in self.shapes:
            _require(
                not self.effect_weight or shape.rows - shape.context[0] > 1,
                "effect_weight",
                self.effect_weight,
                f"needs two query rows or more, but a shape has {shape.rows} rows, of which "
                f"{shape.context[0]} are context",
            )
        _require(
            any(shape.first_step == 0 for shape in self.shapes),
            "shapes",
            self.shapes,
            "give at least one table shape whose first_step is 0",
        )
        _require_share(self, "final_learning_rate_share")
        _require(
            0 <= self.ema_decay < 1,
            "ema_decay",
            self.ema_decay,
            "must be at least 0 and below 1",
        )


@dataclass(frozen=True)
class Config:
    """Everything that defines a run and the checkpoint it writes."""

    prior: PriorConfig = field(default_factory=PriorConfig)
    # The prior of the table shapes that give `covariates`.
    wide: WidePriorConfig = field(default_factory=WidePriorConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def prior_of(self, shape: TableShape) -> PriorConfig | WidePriorConfig:
        """The prior that tables of this shape come from."""
        return self.wide if shape.wide else self.prior

    @property
    def covariates(self) -> int:
        """The most covariates that a table of this run has."""
        return max(
            shape.covariates[1] if shape.wide else self.prior.covariates
            for shape in self.training.shapes
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a config from nested plain values, as TOML and JSON give them.

        Raises:
            ConfigError: an unknown or missing field, or a value of the wrong type or range.
        """
        return build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values; `Config.from_dict` inverts it, also after a trip through JSON."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The config as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads a preset by name, or a TOML file by path, and applies overrides.

        The first line of the file may name another one to start from: `base = "do_pfn"`.

        Args:
            name_or_path: one of `preset_names()`, or a path.
            overrides: texts `section.field=value`, the value as in TOML; a bare word is a string.

        Raises:
            ConfigError: no such preset or file, malformed TOML, an unknown or missing field, or a
                value of the wrong type or range.
        """
        values = read_toml(name_or_path)
        for override in overrides:
            values = merge(values, parse_override(override))
        return cls.from_dict(values)
