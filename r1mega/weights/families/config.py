"""Reading `config.json` key by key, in the spellings of transformers 4 and 5."""

from collections.abc import Mapping
from typing import Any

from r1mega.errors import UserError
from r1mega.weights.architecture import Llama3Rope, Yarn

Config = Mapping[str, Any]


def integer(config: Config, key: str, *, least: int = 1, default: int | None = None) -> int:
    """A whole number of at least `least`; a key that is absent or null takes `default`, or is an error without one."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if key not in config:
        raise UserError(f"config.json: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"config.json: {key} must be a whole number >= {least}, got {value!r}")
    return value


def optional_integer(config: Config, key: str) -> int | None:
    """A positive whole number, or None when the key is null. The key must be there."""
    if key not in config:
        raise UserError(f"config.json: {key} is missing (null says that there is none)")
    return None if config[key] is None else integer(config, key)


def number(config: Config, key: str, *, default: float | None = None) -> float:
    """A number above 0, with `default` when the key is absent or null."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if key not in config:
        raise UserError(f"config.json: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"config.json: {key} must be a number above 0, got {value!r}")
    return float(value)


def flag(config: Config, key: str, default: bool) -> bool:
    """A boolean."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"config.json: {key} must be true or false, got {value!r}")
    return value


def choice(config: Config, key: str, choices: tuple[str, ...], default: str) -> str:
    """One of `choices`."""
    value = config.get(key, default)
    if value not in choices:
        raise UserError(f"config.json: {key} must be one of {', '.join(choices)}, got {value!r}")
    return str(value)


def expect(config: Config, **wanted: Any) -> None:
    """Refuse a key whose value r1mega does not implement; an absent key has the wanted value."""
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise UserError(f"config.json: {key}={config[key]!r} is not supported, only {value!r}")


def rope(config: Config) -> tuple[float, Yarn | Llama3Rope | None]:
    """(theta, scaling): `rope_theta` and `rope_scaling` in transformers 4, one `rope_parameters` in transformers 5."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise UserError(f"config.json: rope_scaling must be an object, got {scaling!r}")
    theta = number(scaling if "rope_theta" in scaling else config, "rope_theta", default=10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    length = integer(scaling, "original_max_position_embeddings")
    if kind == "yarn":
        return theta, Yarn(
            factor=number(scaling, "factor"),
            original_length=length,
            beta_fast=number(scaling, "beta_fast", default=32.0),
            beta_slow=number(scaling, "beta_slow", default=1.0),
            mscale=number(scaling, "mscale", default=1.0),
            mscale_all_dim=number(scaling, "mscale_all_dim", default=0.0),
        )
    if kind == "llama3":
        return theta, Llama3Rope(
            factor=number(scaling, "factor"),
            low_freq_factor=number(scaling, "low_freq_factor"),
            high_freq_factor=number(scaling, "high_freq_factor"),
            original_length=length,
        )
    raise UserError(f"config.json: rope type {kind!r} is not supported, only default, yarn and llama3")
