"""From TOML files, overrides and plain values to dataclasses, checked field by field.

Knows nothing of what the fields mean; that is `dopfn_jax.config`.
"""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field, the value, the remedy."""


def preset_names() -> list[str]:
    """Names that `Config.load` resolves from any directory."""
    return sorted(path.stem for path in _preset_folder().glob("*.toml"))


def _preset_folder() -> Path:
    package = Path(__file__).parent
    # Inside the wheel the presets lie in the package; in a source checkout beside it.
    folders = (package / "configs", package.parent / "configs")
    return next(folder for folder in folders if folder.is_dir())


def _find(name_or_path: str | Path, folder: Path) -> Path:
    """The file of that path, seen from `folder`, or else the preset."""
    for path in (folder / name_or_path, _preset_folder() / f"{name_or_path}.toml"):
        if path.is_file():
            return path
    presets = preset_names()
    raise ConfigError(
        f"config {str(name_or_path)!r}: neither a file nor a preset; "
        f"{_close_match(str(name_or_path), presets)}presets are {', '.join(presets)}"
    )


def read_toml(name_or_path: str | Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file on top of those of its base; `readers` name this one as their base.

    The path of a base is seen from the file that names it.
    """
    path = _find(name_or_path, readers[-1].parent if readers else Path())
    if path in readers:
        raise ConfigError(f"{path}: base = {str(name_or_path)!r} leads back to itself; remove it")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not a TOML file ({error})") from error
    base = values.pop("base", None)
    return values if base is None else merge(read_toml(str(base), (*readers, path)), values)


def merge(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The sections of both, field by field; `values` win."""
    merged = dict(base)
    for section, fields in values.items():
        old = base.get(section, {})
        both_are_tables = isinstance(old, dict) and isinstance(fields, dict)
        merged[section] = {**old, **fields} if both_are_tables else fields
    return merged


def parse_override(override: str) -> dict[str, dict[str, Any]]:
    """The text `section.field=value` as nested values."""
    path, separator, text = override.partition("=")
    section, _, name = path.strip().partition(".")
    if not (separator and section and name):
        raise ConfigError(
            f"override {override!r}: write section.field=value, "
            "for example training.learning_rate=1e-3"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    return {section: {name: value}}


def _close_match(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def build(cls: type, values: Any, where: str) -> Any:
    """`values` as an instance of the dataclass `cls`; `where` is the dotted path for messages."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'config'} = {values!r}: expected a table of fields")
    prefix = f"{where}." if where else ""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(
                f"{prefix}{name} = {value!r}: unknown field; "
                f"{_close_match(name, list(fields))}known fields: {', '.join(fields)}"
            )
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where} = {dict(values)!r}: give also {name!r}")
    arguments = {
        name: _convert(hints[name], value, prefix + name) for name, value in values.items()
    }
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` checked against the type `hint` of the field at the dotted path `where`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} = {value!r}: choose from {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} = {value!r}: expected a list")
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(value) != len(arguments):
            raise ConfigError(f"{where} = {value!r}: expected {len(arguments)} values")
        pairs = enumerate(zip(arguments, value, strict=True))
        return tuple(_convert(item_hint, item, f"{where}[{i}]") for i, (item_hint, item) in pairs)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(
            f"{where} = {value!r}: expected {hint.__name__}, got {type(value).__name__}"
        )
    return value
