"""Patches of torch and megatron-core: where they are, that no import makes one, and which versions they are refused for."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import megabridge.platform as platform
from megabridge.errors import ConfigError
from megabridge.platform import patches
from tests.support.command import python

ROOT = Path(__file__).parents[2]
PATCHES = ROOT / "megabridge" / "platform" / "patches"
FILES = sorted([*ROOT.glob("megabridge/**/*.py"), *ROOT.glob("recipes/*.py")])
# torch's own switch, which deterministic=true turns, and no code of torch's.
SWITCHES = {"megabridge/platform/determinism.py"}
PREPARED = {"models", "native", "training", "planning", "conformance"}
THEMSELVES = ("conversion.parameters", "parallel.process_groups")

CLEAN = """
import importlib, logging, os, pkgutil, sys, warnings
import torch, transformers, datasets, wandb, safetensors.torch, sympy

os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)  # of the process that started this one

def state():
    loggers = [logging.getLogger(name) for name in list(logging.Logger.manager.loggerDict)]
    owned = {f"{owner.__name__}.{name}": value for owner in (torch.cuda, torch.cuda.random, torch.Tensor, torch.distributed)
             for name, value in vars(owner).items() if callable(value)}
    return {
        "functions": {name: id(value) for name, value in owned.items()} | {"torch.compile": id(torch.compile)},
        "modes": torch._C._len_torch_function_stack(),
        "filters": list(warnings.filters),
        "dropped": [logger.name for logger in loggers for filter in logger.filters if "megabridge" in type(filter).__module__],
        "environment": dict(os.environ),
        "megatron": [name for name in sys.modules if name.partition(".")[0] == "megatron"],
    }

before = state()
for room in ("config", "hf", "data", "families", "mapping", "loggers", "platform", "storage", "evaluation"):
    package = importlib.import_module(f"megabridge.{room}")
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not info.name.endswith("__main__") and "plugins" not in info.name:
            importlib.import_module(info.name)
import megabridge.peft, megabridge.parallel.collectives
after = state()
print([name for name in before if before[name] != after[name]])
megabridge.AutoBridge
later = state()
print(sorted(name for name in before if before[name] != later[name]), later["modes"])
"""


def where(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_no_import_patches_or_silences_anything() -> None:
    """But that of AutoBridge, which is nothing without megatron-core."""
    done = python(CLEAN, WANDB_MODE="offline")
    expected = ["dropped", "environment", "filters", "functions", "megatron", "modes"]
    assert done.stdout.splitlines() == ["[]", f"{expected} 1"], done.stdout + done.stderr


def upstream(tree: ast.Module) -> set[str]:
    """The names that a module's imports bind to parts of torch and megatron-core."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(one.asname or one.name).partition(".")[0] for one in node.names if is_upstream(one.name)}
        elif isinstance(node, ast.ImportFrom) and is_upstream(node.module or ""):
            names |= {one.asname or one.name for one in node.names}
    return names


def is_upstream(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "megatron")


def root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def changes(tree: ast.Module) -> Iterator[int]:
    """Lines that set an attribute of something imported from torch or megatron-core, or silence something for the process."""
    names = upstream(tree)
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
        if any(isinstance(target, ast.Attribute) and root(target) in names for target in targets):
            yield node.lineno  # type: ignore[attr-defined]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and root(node.args[0]) in names:
            yield node.lineno
        if isinstance(node, ast.Call) and re.search(r"(^|\.)(filterwarnings|addFilter|set_default_\w+)$", ast.unparse(node.func)):
            yield node.lineno


def test_patches_are_in_one_folder() -> None:
    found = {where(file): list(changes(ast.parse(file.read_text()))) for file in FILES if file.parent != PATCHES}
    assert {file for file, lines in found.items() if lines} == SWITCHES
    assert sum(bool(list(changes(ast.parse(file.read_text())))) for file in PATCHES.glob("*.py")) >= 6, "the search finds them"


def test_each_patch_says_what_it_stands_for() -> None:
    for file in PATCHES.glob("*.py"):
        said = ast.get_docstring(ast.parse(file.read_text())) or ""
        if file.stem not in ("__init__", "quiet"):
            assert re.search(r"(torch|megatron)/[\w/]+\.py", said) and re.search(
                r"megatron-core 0\.19|torch 2\.1\d|[Aa]ny\s+version", said
            ), file


def test_what_imports_megatron_was_prepared() -> None:
    """By the `__init__` of its room, by a room that it imports before, or by itself."""
    for room in PREPARED:
        assert "\nprepare()" in (ROOT / "megabridge" / room / "__init__.py").read_text()
    for file in FILES:
        body = ast.parse(file.read_text()).body
        lines = [ast.unparse(node) for node in body]
        first = next((number for number, line in enumerate(lines) if re.match(r"(from|import) megatron\b", line)), None)
        if first is None or file.relative_to(ROOT).parts[1] in PREPARED:
            continue
        before = "\n".join(lines[:first])
        prepares = rf"megabridge\.({'|'.join([*PREPARED, *THEMSELVES])})\b|^platform\.prepare\(\)"
        assert re.search(prepares, before, re.MULTILINE), where(file)


def test_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    platform.prepare()
    pinned = tomllib.loads((ROOT / "pyproject.toml").read_text())
    first, beyond = patches.MEGATRON
    assert f"megatron-core>={first},<{beyond}" in pinned["project"]["dependencies"]
    assert f"torch>={patches.TORCH[0]}" in pinned["project"]["dependencies"]
    assert pinned["tool"]["uv"]["constraint-dependencies"] == [f"torch<{patches.TORCH[1]}"]
    for version in ("0.18.9", "0.20.0", "1.0"):
        monkeypatch.setattr("megatron.core.__version__", version)
        with pytest.raises(ConfigError, match=rf"some\.patch replaces a part of megatron-core .*but {version} is installed; pip"):
            patches.check_megatron("some.patch")
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu126")
    with pytest.raises(
        ConfigError, match=r"some\.patch replaces a part of torch 2\.11\.0a0 or later, but 2\.10\.1\+cu126 is installed"
    ):
        patches.check_torch("some.patch")
    monkeypatch.setattr(torch, "__version__", "2.15.0")
    with pytest.warns(
        UserWarning, match=r"patches of torch were tested before 2\.15, not with 2\.15\.0; pip install 'torch<2\.15'"
    ):
        patches.check_torch("some.patch")
