"""A `_target_` is checked before it is called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megabridge.config import instantiate
from megabridge.data import DataModule
from megabridge.errors import ConfigError
from megabridge.families import register_named

HERE = __name__


class Base:
    def __init__(self, *, size: int = 1, name: str = "") -> None:
        self.size, self.name = size, name


class Child(Base):
    pass


class Hollow(Base, ABC):
    @abstractmethod
    def fill(self) -> None: ...


class Needy(Base):
    def __init__(self, must: int) -> None:
        super().__init__(size=must)


def build(**node: object) -> Base:
    return instantiate.build(node, Base, where="data")


def test_a_subclass_is_made_with_its_arguments() -> None:
    made = build(_target_=f"{HERE}.Child", size=3)
    assert type(made) is Child and made.size == 3


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "os.system", "command": "touch /tmp/x"}, r"must name a subclass of .*Base; that is builtin_function"),
        ({"_target_": "subprocess.Popen", "args": ["true"]}, "must name a subclass"),
        ({"_target_": "Child"}, "as package.module.Class"),
        ({}, "as package.module.Class"),
        ({"_target_": "no.such.module.Thing"}, "check the name and PYTHONPATH"),
        ({"_target_": f"{HERE}.Chld"}, "did you mean 'Child'"),
        ({"_target_": f"{HERE}.Hollow"}, "is abstract"),
        ({"_target_": f"{HERE}.Child", "sise": 1}, "data.sise: Child takes no such argument; did you mean 'size'"),
        ({"_target_": f"{HERE}.Needy"}, "missing a required argument: 'must'"),
    ],
)
def test_what_is_refused(node: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**node)


def test_named() -> None:
    assert instantiate.named("pathlib:Path", where="x") is Path
    with pytest.raises(ConfigError, match=r"x='pathlib:Pth': pathlib has no 'Pth'; did you mean 'Path'"):
        instantiate.named("pathlib:Pth", where="x")
    with pytest.raises(ConfigError, match=r"must be module:NAME: No module named 'nowhere'"):
        instantiate.named("nowhere:x", where="x")
    with pytest.raises(ConfigError, match=r"must name a megabridge\.families\.Family, not type"):
        register_named("pathlib:Path")


def test_arguments_of_other_types_are_all_named() -> None:
    node = {
        "_target_": "megabridge.data.streaming.StreamedText", "path": 7, "shuffle_buffer": "many", "separate_documents": 1,
        "validation_documents": True, "max_bad_share": 0, "name": None,
    }  # fmt: skip
    with pytest.raises(ConfigError) as raised:
        instantiate.build(node, DataModule, where="data")
    said = str(raised.value)
    assert len(said.splitlines()) == 4 and "data.shuffle_buffer='many' must be int, not str" in said
    assert all(name in said for name in ("data.path=7", "data.separate_documents=1", "data.validation_documents=True"))
    for changes, message in (
        ({"weights": [1, "2"]}, r"data.weights=\[1, '2'\] must be Sequence\[float\] \| None"),
        ({"weights": [float("nan"), 1.0]}, r"data.weights=\[nan, 1.0\] must be 2 positive"),
        ({"weights": [1e308, 1e308]}, "data.weights"),
        ({"weights": []}, "data.weights"),
        ({"split": [1e308, 1e308]}, "data.split"),
        ({"split": [float("nan")]}, "data.split"),
        ({"split": 1}, "data.split=1 must be Sequence"),
        ({"paths": "corpus"}, "data.paths='corpus' must be Sequence"),
    ):
        node = {"_target_": "megabridge.data.pretraining.IndexedTokens", "paths": ["a", "b"], **changes}
        with pytest.raises(ConfigError, match=message):
            instantiate.build(node, DataModule, where="data")


def test_what_the_configs_say_is_of_the_types_that_they_are_for() -> None:
    for group in ("data", "callbacks", "logger"):
        for file in sorted(Path("conf", group).glob("*.yaml")):
            content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
            assert isinstance(content, dict)
            nodes = [content] if "_target_" in content else [node for node in content.values() if isinstance(node, dict)]
            for node in nodes:
                if "_target_" in node:
                    given = {
                        str(key): value for key, value in node.items() if not (isinstance(value, str) and value[:2] in ("${", "??"))
                    }
                    chosen = instantiate.find(given.pop("_target_"), object, where="x")
                    assert instantiate._of_other_types(chosen, given, "x") == [], file
