"""Config fields: pairs of native and Hugging Face settings, converted in both directions.

The Hugging Face side is the content of a published config.json, with old or new keys; the native side uses TransformerConfig's
names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from megabridge.config.value_types import ANYTHING, Kind, list_of, one_of, same, shown
from megabridge.errors import ConfigError
from megabridge.families.core.ranges import POSITIVE, range_of

Json = Mapping[str, Any]
REQUIRED: Final = object()


class FieldLike(Protocol):
    """One setting of a config, convertible in both directions."""

    def keys(self) -> Mapping[str, Kind]:
        """Returns the Hugging Face keys of this field, and their allowed values."""
        ...

    def read(self, hf: Json) -> dict[str, Any]:
        """Returns native settings from a config.json, whose values have been checked against `keys`. Raises ConfigError."""
        ...

    def write(self, native: Json) -> dict[str, Any]:
        """Returns Hugging Face settings from native ones. Raises ConfigError for values that config.json can't express."""
        ...


@dataclass(frozen=True)
class Field:
    """`native` equals `hf`. If the key is absent or null, the value is `default`, a value or a function of the config.

    Allowed values are those of the native setting, unless `kind` is given.
    """

    native: str
    hf: str
    default: Any = REQUIRED
    kind: Kind | None = None

    def keys(self) -> Mapping[str, Kind]:
        kind = self.kind or range_of(self.native)
        return {self.hf: kind.needed() if self.default is REQUIRED else kind.or_null()}

    def read(self, hf: Json) -> dict[str, Any]:
        value = hf.get(self.hf)
        if value is None:
            value = self.default(hf) if isinstance(self.default, Callable) else self.default  # type: ignore[arg-type]
        return {self.native: value}

    def write(self, native: Json) -> dict[str, Any]:
        return {self.hf: native[self.native]}


def given(hf: Json, key: str, default: Any) -> Any:
    """Returns the value of a key, or `default` if it is absent or null."""
    value = hf.get(key)
    return default if value is None else value


def unless_null(key: str, default: Any) -> Callable[[Json], Any]:
    """Returns a default for an absent key; an explicit null means None."""
    return lambda hf: None if key in hf else default


@dataclass(frozen=True)
class Fixed:
    """`native` always has this value in the architecture; Hugging Face has no key for it."""

    native: str
    value: Any

    def keys(self) -> Mapping[str, Kind]:
        return {}

    def read(self, hf: Json) -> dict[str, Any]:
        return {self.native: self.value}

    def write(self, native: Json) -> dict[str, Any]:
        if native[self.native] != self.value:
            raise ConfigError(
                f"{self.native}={native[self.native]!r} can't be written to config.json: this architecture always has "
                f"{self.value!r}; keep it."
            )
        return {}


@dataclass(frozen=True)
class Choice:
    """`native` and `hf` are the same setting with other values; `pairs` are (Hugging Face's, native), the default first."""

    native: str
    hf: str
    pairs: tuple[tuple[Any, Any], ...]

    def keys(self) -> Mapping[str, Kind]:
        return {self.hf: one_of(*(theirs for theirs, _ in self.pairs))}

    def read(self, hf: Json) -> dict[str, Any]:
        value = hf.get(self.hf, self.pairs[0][0])
        return {self.native: next(ours for theirs, ours in self.pairs if same(theirs, value))}

    def write(self, native: Json) -> dict[str, Any]:
        for theirs, ours in self.pairs:
            if ours == native[self.native]:
                return {self.hf: theirs}
        raise ConfigError(f"{self.native}={native[self.native]!r} has no value of config.json's {self.hf!r}; change it back.")


@dataclass(frozen=True)
class Derived:
    """`native` follows from other keys of config.json, which have their own fields; it is never written."""

    native: str
    value: Callable[[Json], Any]

    def keys(self) -> Mapping[str, Kind]:
        return {}

    def read(self, hf: Json) -> dict[str, Any]:
        return {self.native: self.value(hf)}

    def write(self, native: Json) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Converted:
    """`native` is `forth(hf)`, and `hf` is `back(native)`. If the key is absent or null, Hugging Face's value is `default`.

    `kind` are the allowed values of the key, those that `forth` takes.
    """

    native: str
    hf: str
    forth: Callable[[Any], Any]
    back: Callable[[Any], Any]
    default: Any = REQUIRED
    kind: Kind = POSITIVE

    def keys(self) -> Mapping[str, Kind]:
        return Field(self.hf, self.hf, self.default, self.kind).keys()

    def read(self, hf: Json) -> dict[str, Any]:
        value = Field(self.hf, self.hf, self.default).read(hf)[self.hf]
        return {self.native: self.forth(value)}

    def write(self, native: Json) -> dict[str, Any]:
        return {self.hf: self.back(native[self.native])}


@dataclass(frozen=True)
class Alias:
    """`field`, whose key some files call `other`; it is written under its own."""

    field: Field
    other: str

    def keys(self) -> Mapping[str, Kind]:
        kind = self.field.kind or range_of(self.field.native)
        return {self.field.hf: kind.or_null(), self.other: kind.or_null()}

    def read(self, hf: Json) -> dict[str, Any]:
        given = {key: hf.get(key) for key in (self.field.hf, self.other) if hf.get(key) is not None}
        if not given and self.field.default is REQUIRED:
            raise ConfigError(f"config.json must have {self.field.hf!r} or {self.other!r}; add it.")
        if len(given) == 2 and not same(*given.values()):
            raise ConfigError(f"{listing(given)} contradict each other: they are two names for one thing; remove one.")
        return {self.field.native: next(iter(given.values()))} if given else self.field.read(hf)

    def write(self, native: Json) -> dict[str, Any]:
        return self.field.write(native)


@dataclass(frozen=True)
class PerLayer:
    """`field`, whose value may be a list with an entry per layer, which must all be equal."""

    field: Field

    def keys(self) -> Mapping[str, Kind]:
        return {key: kind.or_a(list_of(range_of(self.field.native))) for key, kind in self.field.keys().items()}

    def read(self, hf: Json) -> dict[str, Any]:
        value = hf.get(self.field.hf)
        if isinstance(value, list | tuple):
            if len(set(value)) != 1 or len(value) != hf.get("num_hidden_layers"):
                raise ConfigError(
                    f"{self.field.hf}={shown(value)} can't be represented: there must be an equal entry for each layer."
                )
            return self.field.read({self.field.hf: value[0]})
        return self.field.read(hf)

    def write(self, native: Json) -> dict[str, Any]:
        return self.field.write(native)


@dataclass(frozen=True)
class RequiredValue:
    """A key that must have one of these values: with any other the model would compute something else."""

    hf: str
    values: tuple[Any, ...]

    def keys(self) -> Mapping[str, Kind]:
        return {self.hf: one_of(*self.values)}

    def read(self, hf: Json) -> dict[str, Any]:
        return {}

    def write(self, native: Json) -> dict[str, Any]:
        return {self.hf: self.values[0]}


@dataclass(frozen=True)
class Repeats:
    """A redundant key of published files: its value must be one of `values`, constants or functions of the config.

    It is never written.
    """

    hf: str
    values: tuple[Any, ...]

    def __init__(self, hf: str, *values: Any) -> None:
        object.__setattr__(self, "hf", hf)
        object.__setattr__(self, "values", values)

    def keys(self) -> Mapping[str, Kind]:
        return {self.hf: ANYTHING}

    def read(self, hf: Json) -> dict[str, Any]:
        value = hf.get(self.hf)
        expected = [each(hf) if isinstance(each, Callable) else each for each in self.values]  # type: ignore[arg-type]
        if value is not None and not any(same(value, each) for each in expected):
            said = " or ".join(map(shown, expected))
            raise ConfigError(f"{self.hf}={shown(value)} can't be represented: it must be {said}, which is always so; remove it.")
        return {}

    def write(self, native: Json) -> dict[str, Any]:
        return {}


class Unread:
    """Keys of published files that have no effect: neither transformers' model nor megabridge's reads them."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def keys(self) -> Mapping[str, Kind]:
        return dict.fromkeys(self.names, ANYTHING)

    def read(self, hf: Json) -> dict[str, Any]:
        return {}

    def write(self, native: Json) -> dict[str, Any]:
        return {}


def listing(settings: Mapping[str, Any]) -> str:
    """Formats settings for a message: a=1 and b=2."""
    return " and ".join(f"{key}={shown(value)}" for key, value in settings.items())
