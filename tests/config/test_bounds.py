"""No number without a meaning, and no path that can't be looked up, gets as far as a rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from megabridge.config import bounds
from megabridge.config.schema import Config
from megabridge.errors import ConfigError
from megabridge.launchers.platform_choice import choose_platform
from megabridge.parallel.topology import Topology


def numbers(node: Any, path: str = "") -> Iterator[tuple[Any, str, str]]:
    """(what holds it, its name there, its path) of every setting that is a number, or may be."""
    for each in fields(node):
        value, name = getattr(node, each.name), f"{path}{each.name}"
        if is_dataclass(value):
            yield from numbers(value, f"{name}.")
        elif str(each.type).partition(" ")[0] in ("int", "float"):
            yield node, each.name, name


def test_the_defaults_are_within_their_bounds() -> None:
    config = Config()
    bounds.check_numbers(config)
    bounds.check_paths(config)
    assert {path for _, _, path in numbers(config)} >= set(bounds.BOUNDS)


def test_every_number_must_be_one() -> None:
    found = list(numbers(Config()))
    for value in (float("nan"), float("inf"), float("-inf"), 10**30, -(10**30)):
        config = Config()
        for node, name, _ in numbers(config):
            setattr(node, name, value)
        with pytest.raises(ConfigError) as caught:
            bounds.check_numbers(config)
        said = str(caught.value)
        rule = "must be below 2**53" if isinstance(value, int) else "must be a finite number"
        assert len(found) > 40 and said.count(rule) == 20 and f"... and {len(found) - 20} more" in said


@pytest.mark.parametrize("node", ["model.hf", "model.provider", "recipe.options", "data", "callbacks", "logger"])
def test_numbers_in_open_nodes_too(node: str) -> None:
    top, _, name = node.partition(".")
    for value in (float("nan"), float("inf")):
        config = Config()
        opened: dict[str, Any] = getattr(getattr(config, top), name) if name else getattr(config, top)
        opened["a"] = {"b": [1.0, {"c": value}]}
        if value == float("inf") and node in ("model.hf", "recipe.options"):
            bounds.check_numbers(config)
            continue
        with pytest.raises(ConfigError, match=rf"^{node}\.a\.b\[1\]\.c={value} must be a finite number; set one, or remove"):
            bounds.check_numbers(config)


@pytest.mark.parametrize("path", sorted(bounds.BOUNDS))
def test_bounds_are_said(path: str) -> None:
    least, most = bounds.BOUNDS[path]
    node, _, name = path.rpartition(".")
    for value in [least - 1, *([most + 1] if most < 1e300 else [])]:
        config = Config()
        setattr(getattr(config, node) if node else config, name, value)
        with pytest.raises(ConfigError, match=rf"^{path}=\S+ must be (at least|from) "):
            bounds.check_numbers(config)


def test_sizes_of_a_layout_have_bounds() -> None:
    with pytest.raises(ConfigError, match=r"parallel.etp=0 must be at least 1"):
        Topology(etp=0)
    config = Config(platform="cpu")
    with pytest.raises(ConfigError, match=r"needs 1000000000 processes, and one host starts at most 1024; .*recipe=plan"):
        choose_platform(config, Topology(cp=10**9), gpus=0, memory=2**40, overrides=[])


def test_paths_must_be_such_that_can_be_looked_up(tmp_path: Path) -> None:
    """What is not there, or no folder, may be meant: whoever opens it says so."""
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").touch()
    reasons = {
        "x" * 300: "File name too long",
        "/".join(["d"] * 3000): "File name too long",
        "a\0b": "embedded null byte",
        "\ud800": "surrogates not allowed",
        str(tmp_path / "circle"): "Too many levels of symbolic links",
        "~no_such_user_here/x": "Could not determine home directory",
    }
    with pytest.raises(ConfigError, match="run_dir='' must name a directory"):
        bounds.check_paths(Config(run_dir=""))
    for path, reason in reasons.items():
        config = Config(sweep=path, run_dir=path)
        config.model.path = config.conversion.output = config.peft.path = config.checkpoint.path = path
        with pytest.raises(ConfigError) as caught:
            bounds.check_paths(config)
        said = str(caught.value)
        assert said.count("can't be looked up (") == 6 and reason in said and "; name another path." in said
    for path in ("nothing", str(tmp_path / "file" / "below"), os.fsdecode(b"b\xff"), "org/name", "a b", ""):
        bounds.check_paths(Config(sweep=path, run_dir=path or "run"))
