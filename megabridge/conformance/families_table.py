"""Updates the README's table of architectures: `python -m megabridge.conformance.families_table README.md`.

The models of an architecture come from the docstring of its family's file, the names for `model=` from conf/model.
"""

from __future__ import annotations

import pkgutil
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

import megabridge.families
from megabridge.errors import ConfigError
from megabridge.families.core.family import Family
from megabridge.models import provider_settings
from megabridge.models.backends import OURS

BEGIN: Final = "<!-- architectures: python -m megabridge.conformance.families_table README.md -->\n"
END: Final = "<!-- /architectures -->\n"


def table(models: Path) -> str:
    """Returns Markdown with a row for each of our architectures: its models, its entries in the folder `models`, its backends."""
    named = _entries(models)
    rows = ["| architecture | models | `model=` | `backend=` |", "| --- | --- | --- | --- |"]
    for family, about in sorted(_families(), key=lambda found: found[0].architecture.lower()):
        entries = ", ".join(f"`{name}`" for name in named.get(family.architecture, ()))
        rows.append(f"| `{family.architecture}` | {about} | {entries} | {', '.join(_backends(family))} |")
    return "\n".join(rows) + "\n"


def renewed(text: str, table: str) -> str:
    """Returns `text` with `table` between the two marks. Raises ConfigError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"the file must have a line {BEGIN.strip()!r} and, below it, {END.strip()!r}; add them.")
    return f"{before}{begin}\n{table}\n{end}{after}"


def _entries(models: Path) -> dict[str, list[str]]:
    """Returns the names of the files in `models` by architecture, in natural order."""
    named: dict[str, list[str]] = {}
    for file in sorted(models.glob("*.yaml"), key=lambda file: _natural(file.stem)):
        content = OmegaConf.to_container(OmegaConf.load(file))
        if isinstance(content, dict) and content.get("hf"):
            named.setdefault(content["hf"]["architectures"][0], []).append(file.stem)
    return named


def _natural(name: str) -> list[tuple[int, str]]:
    """Returns a sort key that puts qwen3_8b before qwen3_14b."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _families() -> Iterator[tuple[Family, str]]:
    """Yields each family that comes with megabridge, and the models it is for."""
    for info in pkgutil.iter_modules(megabridge.families.__path__, "megabridge.families."):
        module = import_module(info.name)
        names = vars(module)
        for family in names.get("FAMILIES") or [names[name] for name in ("FAMILY",) if name in names]:
            about = re.search(rf"\b{family.architecture}: ([^;(]+)", module.__doc__ or "")
            if about is None:
                raise ConfigError(f"the docstring of {info.name} must say '{family.architecture}: <its models>'; add it.")
            yield family, " ".join(about[1].split())


def _backends(family: Family) -> tuple[str, ...]:
    """Returns the backends that run the tiny config, without `local`, which is for comparisons and supports what te does."""
    native = family.native(family.tiny)

    def get(name: str) -> Any:
        return native[name] if name in native else provider_settings.default(name)

    return tuple(name for name, one in OURS.items() if name != "local" and not one.lacks(get))


def main() -> None:
    file = Path(sys.argv[1])
    text = renewed(file.read_text(encoding="utf-8"), table(file.parent / "conf" / "model"))
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
