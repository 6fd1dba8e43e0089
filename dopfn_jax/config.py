"""Configuration: frozen dataclasses that validate themselves, read from TOML, carried by checkpoints as JSON."""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from dopfn_jax.scm.case_studies import CASE_STUDIES
from dopfn_jax.scm.mechanisms import MECHANISMS
from dopfn_jax.scm.noise import NOISE_FAMILIES


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field, the value and the remedy."""


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{name} = {value!r}: {remedy}")


def _require_known(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    _require(len(values) > 0, name, values, f"give at least one of {', '.join(known)}")
    for value in values:
        _require(value in known, name, value, f"choose from {', '.join(known)}")


@dataclass(frozen=True)
class PriorConfig:
    """The distribution over structural causal models and tables (Do-PFN, Algorithm 1 and Appendix C.1)."""

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
    # "interventional": queries ask y under do(t), t a coin flip. "observational": t and y as observed.
    target: Literal["interventional", "observational"] = "interventional"

    def __post_init__(self) -> None:
        _require(self.min_nodes >= 2, "prior.min_nodes", self.min_nodes, "a treatment and an outcome need 2 nodes")
        _require(
            self.max_nodes >= self.min_nodes,
            "prior.max_nodes",
            self.max_nodes,
            f"must be at least prior.min_nodes = {self.min_nodes}",
        )
        _require(self.max_hidden >= 0, "prior.max_hidden", self.max_hidden, "must be 0 or more")
        if self.case_study:
            _require_known("prior.case_study", [self.case_study], list(CASE_STUDIES))
        _require_known("prior.mechanisms", self.mechanisms, list(MECHANISMS))
        _require_known("prior.noise_families", self.noise_families, list(NOISE_FAMILIES))
        low, high = self.root_scale
        _require(0 < low <= high, "prior.root_scale", self.root_scale, "needs 0 < low <= high")
        _require(self.noise_scale >= 0, "prior.noise_scale", self.noise_scale, "must be 0 or more")
        _require(
            0 <= self.zero_effect_share <= 1,
            "prior.zero_effect_share",
            self.zero_effect_share,
            "is a share: between 0 and 1",
        )

    @property
    def nodes(self) -> int:
        """Array size of the node axis K."""
        return len(CASE_STUDIES[self.case_study].nodes) if self.case_study else self.max_nodes

    @property
    def covariates(self) -> int:
        """Array size of the covariate axis F: the most covariates that a task of this prior shows."""
        return len(CASE_STUDIES[self.case_study].shown) if self.case_study else self.max_nodes - 2


@dataclass(frozen=True)
class ModelConfig:
    """The transformer and its bar distribution."""

    width: int = 192
    layers: int = 12
    heads: int = 6
    # Hidden width of the MLP, as a multiple of `width`.
    mlp_ratio: int = 4
    # Covariates per token: 1 = a token per cell; g = groups of g columns; 0 = all, one token per row.
    features_per_token: int = 1
    # Buckets of the bar distribution.
    buckets: int = 100
    # Share of the bucket borders spaced evenly over the central range of y instead of by its quantiles.
    uniform_border_share: float = 0.0
    # Arithmetic of the layers; parameters and the bar distribution stay in float32.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    # Recompute each layer in the backward pass: less memory, a third more arithmetic.
    remat: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "mlp_ratio"):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be 1 or more")
        _require(
            self.width % self.heads == 0,
            "model.heads",
            self.heads,
            f"must divide model.width = {self.width}",
        )
        _require(
            self.features_per_token >= 0,
            "model.features_per_token",
            self.features_per_token,
            "use 1 for a token per cell, g for groups of g columns, 0 for one token per row",
        )
        _require(self.buckets >= 4, "model.buckets", self.buckets, "must be 4 or more")
        _require(
            0 <= self.uniform_border_share < 1,
            "model.uniform_border_share",
            self.uniform_border_share,
            "is a share: at least 0, below 1",
        )


@dataclass(frozen=True)
class TableShape:
    """One compiled shape of a training step: `tasks` tables of `rows` rows.

    Each table draws its context size uniformly from the closed interval `context`; its other rows are queries.
    """

    rows: int
    context: tuple[int, int]
    tasks: int
    # How often this shape is drawn, relative to the others.
    weight: float = 1.0

    def __post_init__(self) -> None:
        low, high = self.context
        _require(
            2 <= low <= high < self.rows,
            "training.shapes.context",
            self.context,
            f"needs 2 <= low <= high < rows = {self.rows} (at least one query row)",
        )
        _require(self.tasks >= 1, "training.shapes.tasks", self.tasks, "must be 1 or more")
        _require(
            0 < self.weight < math.inf, "training.shapes.weight", self.weight, "must be positive and finite"
        )


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation, schedule and bookkeeping of a run."""

    steps: int = 100_000
    seed: int = 0
    # The shape of step k is drawn from these, as a function of (seed, k) alone.
    shapes: tuple[TableShape, ...] = (TableShape(rows=2200, context=(10, 2199), tasks=8),)
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 1000
    # Learning rate at the end of the cosine, as a share of its peak.
    final_learning_rate_share: float = 0.02
    weight_decay: float = 0.01
    # Gradients are scaled down to this global norm.
    clip_norm: float = 1.0
    # Decay of the exponential moving average of the parameters that is evaluated and exported (0 = off).
    ema_decay: float = 0.999
    log_every: int = 20
    # Steps between evaluations on fixed held-out tasks of the prior (0 = only at the end).
    validate_every: int = 500
    validation: TableShape = TableShape(rows=256, context=(192, 192), tasks=256)
    # Minutes between checkpoints; one more is always written at the end.
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in ("steps", "log_every"):
            _require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "must be 1 or more")
        for name in ("seed", "warmup_steps", "validate_every", "weight_decay", "checkpoint_minutes"):
            _require(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "must be 0 or more")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"training.{name}", value, "must be positive and finite")
        _require(len(self.shapes) > 0, "training.shapes", self.shapes, "give at least one table shape")
        _require(
            0 <= self.final_learning_rate_share <= 1,
            "training.final_learning_rate_share",
            self.final_learning_rate_share,
            "is a share: between 0 and 1",
        )
        _require(
            0 <= self.ema_decay < 1, "training.ema_decay", self.ema_decay, "must be at least 0 and below 1"
        )


@dataclass(frozen=True)
class Config:
    """Everything that defines a run and the checkpoint it writes."""

    prior: PriorConfig = field(default_factory=PriorConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a config from nested plain values (TOML, JSON). Raises ConfigError on an unknown or ill-typed field."""
        return _build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values; `Config.from_dict` inverts it, also after a trip through JSON."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The config as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads a preset by name or a TOML file by path and applies `section.field=value` overrides.

        A file may name another preset or file as its `base` and hold only what differs.

        Raises:
            ConfigError: no such preset or file, malformed TOML, unknown field, or a value of the wrong type or range.
        """
        values = _read_toml(name_or_path)
        for override in overrides:
            _apply_override(values, override)
        return cls.from_dict(values)


def preset_names() -> list[str]:
    """Names that `Config.load` resolves from any directory."""
    return sorted(path.stem for path in _preset_folder().glob("*.toml"))


def _preset_folder() -> Path:
    package = Path(__file__).parent
    # Inside the wheel the presets lie in the package; in a source checkout beside it.
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def _find(name_or_path: str | Path) -> Path:
    for path in (Path(name_or_path), _preset_folder() / f"{name_or_path}.toml"):
        if path.is_file():
            return path
    raise ConfigError(
        f"config {str(name_or_path)!r}: neither a file nor a preset; presets are {', '.join(preset_names())}"
    )


def _read_toml(name_or_path: str | Path) -> dict[str, Any]:
    path = _find(name_or_path)
    try:
        values = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not a TOML file ({error})") from error
    base = values.pop("base", None)
    if base is None:
        return values
    merged = _read_toml(base)
    for section, fields in values.items():
        merged[section] = {**merged.get(section, {}), **fields}
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    section, dot, name = path.strip().partition(".")
    if not (separator and dot and name):
        raise ConfigError(
            f"override {override!r}: write section.field=value, for example training.learning_rate=1e-3"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    values.setdefault(section, {})[name] = value


def _build(cls: type, values: Any, where: str) -> Any:
    """`values` as an instance of the dataclass `cls`; `where` is the dotted path for messages."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'config'} = {values!r}: expected a table of fields")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(f"{where}{name}: unknown field; {hint}known fields: {', '.join(names)}")
    arguments = {name: _convert(hints[name], value, where + name) for name, value in values.items()}
    try:
        return cls(**arguments)
    except TypeError as error:  # a field without a default is missing
        raise ConfigError(f"{where.rstrip('.')}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` checked against the type `hint` of the field at the dotted path `where`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where + ".")
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} = {value!r}: choose from {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} = {value!r}: expected a list")
        if arguments[-1] is Ellipsis:
            return tuple(_convert(arguments[0], item, where) for item in value)
        if len(value) != len(arguments):
            raise ConfigError(f"{where} = {value!r}: expected {len(arguments)} values")
        return tuple(_convert(h, item, where) for h, item in zip(arguments, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(hint, types.GenericAlias) and type(value) is not hint:
        raise ConfigError(f"{where} = {value!r}: expected {hint.__name__}, got {type(value).__name__}")
    return value
