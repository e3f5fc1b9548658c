"""A `_target_` is checked before it is called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import pytest

from megabridge.config import instantiate
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
