"""Backends are asked: which one `auto` takes, what refusals name, and one that an installed package brings."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest

from megabridge.config import installed
from megabridge.errors import ConfigError
from megabridge.models.backends import OURS, registry
from megabridge.models.backends.te_backend import TransformerEngineBackend
from tests.support import llama
from tests.support.rank_server import RankServer

PACKAGE = """\
    from megabridge.models.backends.torch_backend import TorchBackend


    class Outside(TorchBackend):
        name = "outside"

        def lacks(self, get):
            return {**super().lacks(get), **({"qk_norm": ""} if get("qk_norm") else {})}

        def mlp(self, modules, config):
            print(f"a dense MLP of {type(self).__module__}")
            return super().mlp(modules, config)


    BACKEND, WRONG = Outside(), Outside
"""


def chosen(**settings: Any) -> str:
    return llama.provider_of({}, settings).resolved_backend.name


def test_the_names_known_before_torch_is_imported_are_the_backends() -> None:
    assert installed.OURS == tuple(OURS) == tuple(one.name for one in OURS.values())


def test_auto_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen() == "torch"
    monkeypatch.setattr(TransformerEngineBackend, "missing", lambda self: None)
    assert [chosen(), chosen(context_parallel_size=2), chosen(fp8="hybrid")] == ["te"] * 3
    needs: list[dict[str, Any]] = [
        {"post_norm": True},
        {"softmax_type": "learnable"},
        {"adapted": True},
        {"use_cpu_initialization": True},
    ]
    assert [chosen(**settings) for settings in needs] == ["torch"] * 4
    with pytest.raises(ConfigError, match=r"parallel\.cp=2 needs backend=te, not torch"):
        llama.provider_of({}, {"adapted": True, "context_parallel_size": 2}).finalize()
    with pytest.raises(ConfigError, match=r"adapters need backend=torch or local, not te; set it so\."):
        llama.provider_of({}, {"adapted": True, "backend": "te"}).finalize()


def test_transformer_engine_is_planned_with_layers_that_need_no_device() -> None:
    config = SimpleNamespace(fp8="hybrid", fp4=None)
    assert OURS["te"].without_memory(config).name == "torch" and config.fp8 is None


def site(folder: Path, points: str) -> str:
    """A folder for PYTHONPATH with the package as pip would have put it there."""
    files = {
        "outside.py": dedent(PACKAGE),
        "outside-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n",
        "outside-1.0.dist-info/entry_points.txt": f"[{installed.GROUP}]\n{points}\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


def test_a_backend_of_an_installed_package(ranks: RankServer, tmp_path: Path) -> None:
    path = site(tmp_path / "site", "outside = outside:BACKEND")
    tiny = "experiment=tiny_smoke recipe=pretrain data=random_tokens recipe.steps=2 callbacks=none checkpoint=none"

    def run(overrides: str) -> tuple[int, str]:
        done = ranks.program(f"{tiny} {overrides}", cwd=tmp_path, environ={"PYTHONPATH": path})
        return done.returncode, done.stdout + done.stderr

    status, output = run("backend=outside parallel=tp2")
    assert status == 0 and "backend=outside" in output and "a dense MLP of outside" in output and "step 2/2" in output, output
    status, output = run("backend=outside +model.provider.qk_norm=head")
    assert status and "qk_norm='head' needs backend=torch or te or local, not outside; set it so." in output, output
    status, output = run("backend=outsider")
    assert status and "backend=outsider does not exist; did you mean 'outside'?" in output, output
    status, output = run("backend.name=outsider")
    assert status and "backend.name='outsider' is not one of auto, torch, te, local, outside; did you mean 'outside'?" in output, (
        output
    )
    site(tmp_path / "site", "te = outside:BACKEND")
    status, output = run("")
    assert status and "an entry point of megabridge.backends must have a name of its own" in output, output


def test_an_entry_point_must_name_such_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(site(tmp_path, "outside = outside:WRONG\nother = outside:BACKEND"))
    installed.backends.cache_clear()
    try:
        for name in ("outside", "other"):
            with pytest.raises(
                ConfigError, match=f"entry point {name} = 'outside:.*' must name a .*Backend whose name is '{name}'"
            ):
                registry.backend(name)
    finally:
        installed.backends.cache_clear()
