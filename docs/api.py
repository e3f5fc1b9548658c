"""Prints docs/api.md, the reference of the public names, from their signatures and docstrings: python docs/api.py > docs/api.md"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from textwrap import dedent
from typing import Any

PUBLIC = {
    "AutoBridge": ["megabridge:AutoBridge", "megabridge.bridge.source:ModelSource", "megabridge.conversion.report:Report"],
    "Models": ["megabridge.models.provider:ModelProvider"],
    "Adapters": ["megabridge.peft:LoRA"],
    "Classes of your own": [
        "megabridge.data:DataModule",
        "megabridge.callbacks:Callback",
        "megabridge.loggers:Logger",
        "megabridge.families:Family",
    ],
    "Conversion as data": ["megabridge.conversion.tasks:ConversionTask", "megabridge.conversion.tasks:Box"],
    "Errors": [
        "megabridge.errors:MegabridgeError",
        "megabridge.errors:ConfigError",
        "megabridge.errors:MappingError",
        "megabridge.errors:CheckpointError",
        "megabridge.errors:ParityError",
    ],
}


def signature(function: Any) -> str:
    """Names and defaults; types are in the docstrings or plain."""
    shown = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("self", "cls")
    ]
    return re.sub(r"<object object at \w+>", "...", str(inspect.Signature(shown)))


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that the class itself defines, in their order."""
    for name, member in vars(cls).items():
        if not name.startswith("_") and (callable(getattr(cls, name)) or isinstance(member, property)):
            yield name, member


def page() -> str:
    made = "Made from the docstrings by `python docs/api.py > docs/api.md`. Every rank calls what is collective."
    lines = ["# Reference", "", made, ""]
    for section, names in PUBLIC.items():
        lines += [f"## {section}", ""]
        for place in names:
            module, _, name = place.partition(":")
            cls = getattr(importlib.import_module(module), name)
            lines += [f"### {name}", "", f"`{module}.{name}`", "", text(cls), ""]
            if dataclasses.is_dataclass(cls) and section != "AutoBridge":
                lines += [", ".join(f"`{field.name}`" for field in dataclasses.fields(cls)), ""]
            for attribute, member in members(cls):
                if inspect.getdoc(member) is None or dataclasses.is_dataclass(member):
                    continue
                call = "" if isinstance(member, property) else signature(getattr(cls, attribute))
                lines += [f"#### {attribute}{call}".replace("*", "\\*"), "", text(member), ""]
    return "\n".join(lines).rstrip() + "\n"


def text(thing: Any) -> str:
    """The docstring, whose paragraphs stay paragraphs."""
    return dedent(inspect.getdoc(thing) or "")


if __name__ == "__main__":
    print(page(), end="")
