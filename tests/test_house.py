"""The house stays in order: sizes, names, the public surface, and what a commit must not hold."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.command import ROOT

MODULES = sorted([*ROOT.glob("megabridge/**/*.py"), *ROOT.glob("recipes/**/*.py")])
NOT_NAMES = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "handler"}
# megatron-core's name for what is not sharded in a checkpoint (common.pt), and for the greatest number of batches.
ALLOWED = {"_common", "common", "read_common"}
# What the public package offers. Changing it is a change of the product.
PUBLIC = ["AutoBridge", "__version__"]
# Files that comments and docstrings name: of this repository, or of the packages in SOURCES.
NAMED = re.compile(r"(?<![\w./<*{}-])[\w-]+(?:/[\w.-]+)*\.py\b")
SOURCES = ("megatron", "transformers", "torch/cuda", "torch/distributed", "peft")
ELSEWHERE = ("megatron/bridge/", "megatron/training/", "lm_eval/", "llama.cpp/", "gpt-2/")  # packages that needn't be installed
# An address of a package index is the machine's business, never the project's; written so that this file has none.
INDEX = re.compile("|".join([r"--(extra-)?" + "index-url", "pypi" + r"\.org", "pythonhosted" + r"\.org", r"/simple" + r"/?\s*$"]))


def tracked() -> list[Path]:
    """Files under version control, or, in an unpacked archive, all that would be."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def where(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_modules_and_functions_are_small() -> None:
    large = {where(file): count for file in MODULES if (count := len(file.read_text().splitlines())) > 400}
    large.pop("megabridge/bridge/auto_bridge.py", None)  # forwarding methods with their docstrings
    assert not large
    long = {
        f"{where(file)}:{node.name}": count
        for file in MODULES
        for node in functions(file)
        if (count := (node.end_lineno or 0) - node.lineno + 1) > 60
    }
    assert not long


def test_what_tests_share_is_in_support() -> None:
    imports = [
        f"{where(file)}: {node.module}"
        for file in sorted(ROOT.glob("tests/**/*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and re.match(r"tests(?!\.support|\.system\b)", node.module or "")
    ]
    assert not imports


def test_the_top_level_is_packages() -> None:
    assert {file.name for file in (ROOT / "megabridge").glob("*.py")} == {
        "__init__.py",
        "run.py",
        "worker.py",
        "errors.py",
        "version.py",
    }


def test_contributing_has_the_order_that_is_checked() -> None:
    """The rooms, from upper to lower, and those that import megatron."""
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    by_id = {contract["id"]: contract for contract in contracts}
    layers = [layer.split(" | ") for layer in by_id["house"]["layers"]]
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lines = re.findall(r"^    ((?:[a-z]+, )*[a-z]+)(?:  .*)?$", text.partition("`make lint` checks it:")[2], re.MULTILINE)
    assert [line.split(", ") for line in lines] == layers
    (said,) = re.findall(r"^`megatron` is imported only in ([a-z, ]+);", text, re.MULTILINE)
    importing = {
        file.relative_to(ROOT / "megabridge").parts[0]
        for file in MODULES
        if file.is_relative_to(ROOT / "megabridge") and re.search(r"^\s*(from|import) megatron\b", file.read_text(), re.MULTILINE)
    }
    assert set(re.split(r", | and ", said)) == importing
    assert not importing & {module.removeprefix("megabridge.") for module in by_id["engine"]["source_modules"]}


def test_families_are_tables() -> None:
    """Files of one family each; what they are written in is in core/."""
    families = [file for file in ROOT.glob("megabridge/families/*.py") if file.name != "__init__.py"]
    assert families
    assert not {where(file): n for file in families if (n := len(file.read_text().splitlines())) > 100}


def test_conf_is_yaml_and_experiments_are_short() -> None:
    files = [file for file in (ROOT / "conf").rglob("*") if file.is_file()]
    assert files and all(file.suffix == ".yaml" for file in files)
    assert not [where(file) for file in (ROOT / "conf" / "experiment").iterdir() if len(file.read_text().splitlines()) > 30]
    assert not [where(file) for file in files if not file.read_text().startswith("#")], "each says what it is for"


def test_names_say_what_things_are() -> None:
    found = []
    for file in MODULES:
        names = [file.stem] + [
            node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef | ast.FunctionDef)
        ]
        for name in names:
            words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
            found += [f"{where(file)}: {name}"] if words & NOT_NAMES and name not in ALLOWED else []
    assert not found


def test_functions_are_typed_and_modules_say_what_they_are() -> None:
    assert not [where(file) for file in MODULES if not ast.get_docstring(ast.parse(file.read_text()))]


def test_named_files_exist() -> None:
    """A path ends that of a file here or in SOURCES; a bare name is beside its file, or beside a path named in the same module."""
    site = Path(str(find_spec("torch").origin)).parent.parent  # type: ignore[union-attr]
    known = [str(file) for file in (*MODULES, *(file for name in SOURCES for file in (site / name).rglob("*.py")))]
    unknown = []
    for file in MODULES:
        names = {name for name in NAMED.findall(file.read_text()) if not name.startswith(ELSEWHERE)}
        paths = {name: [path for path in known if path.endswith(f"/{name}")] for name in names if "/" in name}
        folders = [file.parent, *(Path(path).parent for found in paths.values() for path in found)]
        bare = {name: [folder for folder in folders if (folder / name).is_file()] for name in names if "/" not in name}
        unknown += [f"{where(file)}: {name}" for name, found in {**paths, **bare}.items() if not found]
    assert not unknown


def test_the_public_surface_is_frozen() -> None:
    import megabridge

    assert sorted(megabridge.__all__) == sorted(PUBLIC)


def test_no_package_index_in_a_commit() -> None:
    hits = []
    for file in tracked():
        try:
            text = file.read_text()
        except UnicodeDecodeError:
            continue
        hits += [f"{where(file)}:{number}" for number, line in enumerate(text.splitlines(), 1) if INDEX.search(line)]
    assert not hits


def test_the_lock_is_complete() -> None:
    """Names, versions, hashes; every direct dependency is in it."""
    import tomllib

    lock = (ROOT / "requirements.lock").read_text()
    pins = re.findall(r"^([a-z0-9-]+)==\S+(?: ;[^\\]*)? ?\\\n    --hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE)
    assert len(pins) == len(re.findall(r"^[a-z0-9]\S*==", lock, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {re.split(r"[<>=\[ ]", text)[0] for text in direct} <= set(pins)


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_launch_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", ROOT / "launch" / name], check=True)


def test_make_says_how_to_get_python(tmp_path: Path) -> None:
    """Where only an older python3 is found, in an empty PATH but for it."""
    for tool in ("bash", "sed", "grep", "mkdir", "env"):
        found = subprocess.run(["bash", "-c", f"command -v {tool}"], capture_output=True, text=True, check=True).stdout.strip()
        (tmp_path / tool).symlink_to(found)
    work = tmp_path / "work"
    work.mkdir()
    for name in ("Makefile", "requirements.lock", "requirements.uv", "pyproject.toml"):
        (work / name).write_bytes((ROOT / name).read_bytes())
    old = tmp_path / "python3"
    old.write_text('#!/bin/bash\n[ "$1" = --version ] && { echo Python 3.9.1; exit 0; }\nexit 1\n')
    old.chmod(0o755)
    make = subprocess.run(["bash", "-c", "command -v make"], capture_output=True, text=True, check=True).stdout.strip()
    answer = subprocess.run(
        [make, "venv"],
        cwd=work,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert answer.returncode != 0 and not (work / ".venv").exists()
    assert "needs Python 3.12" in answer.stderr and "Python 3.9.1" in answer.stderr and "pyenv install 3.12" in answer.stderr
