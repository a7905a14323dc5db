"""What settings have in common: the error of a broken rule, and the way to JSON and back."""

import dataclasses
import math
import types
import typing
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting breaks a rule. The message gives the rule, the values and a way out."""


class ShortRepr:
    """Settings that show what of them is not the default, as Python would make them again."""

    def __repr__(self) -> str:
        shown = []
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if value != default:
                shown.append(f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


def counted(count: int | float, noun: str) -> str:
    """So many of a thing whose plural ends in s: "1 shape", "1.5 epochs", "2,048 rows"."""
    return f"{count:,.15g} {noun}{'s' * (count != 1)}"


def require(condition: bool, rule: str) -> None:
    if not condition:
        raise ConfigError(rule)


def require_finite(config: Any) -> None:
    """Every number of a section, in tuples too, is finite."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        for number in value if isinstance(value, tuple) else (value,):
            is_odd = isinstance(number, float) and not math.isfinite(number)
            require(not is_odd, f"{f.name} must be a finite number: got {number}.")


def require_rates(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0.0 <= value <= 1.0, f"{name} is a probability between 0 and 1: got {value}.")


def require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name} must be above 0: got {value}.")
        require(value < 2**31, f"{name} must be below 2147483648, as sizes and counts are: got {value}.")


def nearest_divisors(n: int, near: int) -> str:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    divisors = sorted({*small, *(n // d for d in small)})
    below, above = [d for d in divisors if d < near], [d for d in divisors if d > near]
    return " and ".join(map(str, below[-1:] + above[:1]))


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as JSON-ready dictionaries; `from_dict` is its inverse."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Any, path: str = "") -> T:
    """Build `cls` from nested dictionaries. An unknown name or a wrong type is a ConfigError that names it."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path.rstrip('.') or cls.__name__} must be a section of settings: got {values!r}.")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if check_names := getattr(cls, "check_names", None):
        check_names(values)
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"unknown field {path}{unknown[0]}; known are {', '.join(sorted(known))}.")
    parsed = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            parsed[name] = from_dict(hint, value, f"{path}{name}.")  # type: ignore[arg-type]
        else:
            parsed[name] = _checked(value, hint, path + name)
    return cls(**parsed)


def _checked(value: Any, hint: Any, name: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        elif typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            of_each = typing.get_args(option)[0]
            if dataclasses.is_dataclass(of_each):
                return tuple(from_dict(of_each, v, f"{name}.{i}.") for i, v in enumerate(value))  # type: ignore[arg-type]
            return tuple(_checked(v, of_each, name) for v in value)
        elif type(value) is option:
            return value
    shown = hint if len(options) == 1 else " | ".join(_shown(option) for option in options)
    raise ConfigError(f"{name} must be {shown}: got {value!r}.")


def _shown(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return " | ".join(map(repr, typing.get_args(option)))
    return "None" if option is types.NoneType else option.__name__ if isinstance(option, type) else str(option)


def differences(a: Any, b: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields (dotted) whose values differ between two trees of one type."""
    found: dict[str, tuple[Any, Any]] = {}
    for f in dataclasses.fields(a):
        left, right = getattr(a, f.name), getattr(b, f.name)
        if dataclasses.is_dataclass(left):
            found |= differences(left, right, f"{path}{f.name}.")
        elif left != right:
            found[path + f.name] = (left, right)
    return found
