"""Instantiates the classes that a `_target_` in the config names, after checking class and arguments.

Only data, callbacks.* and logger.* may hold a `_target_` (megabridge.config.validation.check_targets). Nothing that came with a
checkpoint ever gets here.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from megabridge.config.validation import nearest
from megabridge.config.value_types import shown
from megabridge.errors import ConfigError, listed


def build[T](node: Mapping[str, Any], base: type[T], *, where: str) -> T:
    """Returns an instance of the class that `node["_target_"]` names, with the other keys as its arguments.

    `where` is the node's path in the config, for messages. Raises ConfigError when the target can't be found or is not a subclass
    of `base`, or when an argument is unknown, missing, or not of its annotated type.
    """
    arguments = {str(key): value for key, value in node.items() if key != "_target_"}
    chosen = find(node.get("_target_"), base, where=where)
    signature = inspect.signature(chosen)
    accepted = list(signature.parameters)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        for name in arguments:
            if name not in accepted:
                rule = f"{where}.{name}: {chosen.__name__} takes no such argument{nearest(name, accepted)}"
                raise ConfigError(f"{rule} It takes: {', '.join(accepted) or 'none'}.")
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{where}: {chosen.__name__} can't be called with these arguments: {error}.") from error
    if problems := _of_other_types(chosen, arguments, where):
        raise ConfigError(listed(problems))
    return chosen(**arguments)


def _of_other_types(chosen: type, arguments: Mapping[str, Any], where: str) -> list[str]:
    """Returns a line for each argument that isn't of its annotated type, as far as that consists of JSON types."""
    try:
        hints = get_type_hints(chosen.__init__)  # type: ignore[misc]  # of this very class
    except NameError:  # annotations with names that only a type checker imports
        return []
    written = inspect.signature(chosen).parameters
    return [
        f"{where}.{name}={shown(value)} must be {written[name].annotation}, not {type(value).__name__}; set it so."
        for name, value in arguments.items()
        if name in hints and name in written and not _fits(value, hints[name])
    ]


def _fits(value: object, hint: Any) -> bool:
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is float:
        return type(value) in (int, float)
    if origin in (int, bool, str, NoneType):
        return type(value) is origin
    if origin in (Sequence, list):
        return isinstance(value, list | tuple) and all(_fits(each, inner[0]) for each in value if inner)
    if origin in (Mapping, dict):
        return isinstance(value, Mapping)
    return True


def named(target: str, *, where: str) -> Any:
    """Returns the object that `target`, module:NAME, names. Raises ConfigError, with the closest name, when there is none."""
    module_name, _, name = target.partition(":")
    try:
        members = vars(importlib.import_module(module_name))
    except ModuleNotFoundError as error:
        raise ConfigError(f"{where}={target!r} must be module:NAME: {error}; check the name and PYTHONPATH.") from error
    if name not in members:
        raise ConfigError(f"{where}={target!r}: {module_name} has no {name!r}{nearest(name, list(members))}")
    return members[name]


def find[T](target: object, base: type[T], *, where: str) -> type[T]:
    """Returns the class `target`, given as package.module.Class. Raises ConfigError unless it is a subclass of `base`."""
    rule = f"{where}._target_={target!r} must name a subclass of {base.__module__}.{base.__qualname__}"
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{rule}, as package.module.Class.")
    module_name, _, class_name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{rule}: {error}; check the name and PYTHONPATH.") from error
    members = vars(module)
    if class_name not in members:
        raise ConfigError(f"{rule}: {module_name} has no {class_name!r}{nearest(class_name, list(members))}")
    found = members[class_name]
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{rule}; that is {type(found).__name__} {found!r}.")
    if inspect.isabstract(found):
        raise ConfigError(f"{rule}; {class_name} is abstract; name a subclass that defines all its methods.")
    return found
