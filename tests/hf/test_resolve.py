"""Where models come from: what is fetched, and what each refusal says, against a hub on this machine and one that is silent."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from megabridge.errors import CheckpointError
from megabridge.hf import quickstart, resolve
from tests.support.fake_hub import COMMIT, serving

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b'{"eos_token_id": 2}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"eos_token": "x"}',
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}',
    # Never fetched:
    "modeling_own.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same again",
    "original/model.safetensors": b"the same again",
    "README.md": b"text",
}
WEIGHTS = [name for name in FILES if name.startswith("model") and not name.endswith(".py")]
ASSETS = [*FILES][:5]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    models = {
        "org/whole": FILES,
        "org/pickles": {"config.json": b"{}", "pytorch_model.bin": b"x"},
        "org/none": {"README.md": b""},
        "org/bare": FILES,
    }
    with serving(models, gated="org/gated") as (address, fetched):
        use_endpoint(monkeypatch, address, tmp_path / "hub")
        yield fetched


def use_endpoint(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    # Default arguments were taken at import.
    for function in (huggingface_hub.snapshot_download, huggingface_hub.try_to_load_from_cache):
        assert (
            function.__kwdefaults__ is None
            or "cache_dir" not in function.__kwdefaults__
            or function.__kwdefaults__["cache_dir"] is None
        )
    huggingface_hub.close_session()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A hub that takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        use_endpoint(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path / "hub")
        yield


def refusal(path: str | Path, **arguments: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve.resolve(path, **arguments)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve.resolve(tmp_path) == resolve.resolve(str(tmp_path)) == tmp_path


def test_what_is_no_model_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step_4" / "hf").mkdir(parents=True)
    (tmp_path / "step_4" / "hf" / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    assert "must be a folder with a Hugging Face model, not a file" in refusal("notes.txt")
    assert "hf has one" in refusal(tmp_path / "step_4")
    assert "it holds notes.txt, step_4" in refusal(tmp_path)
    assert f"is {tmp_path / 'step_4'} meant?" in refusal(tmp_path / "step_5")
    assert "'a/b/c' must be an existing folder, or a hub id" in refusal("a/b/c")
    assert "'' must be an existing folder" in refusal("")
    assert "'../x' must be an existing folder" in refusal("../x")


def test_only_what_a_model_needs_is_fetched(hub: list[str]) -> None:
    folder = resolve.resolve("org/whole", progress=False)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {name: FILES[name] for name in ASSETS + WEIGHTS}
    assert sorted(hub) == sorted(ASSETS + WEIGHTS)
    assert folder.name == COMMIT


def test_config_only_fetches_no_weights(hub: list[str]) -> None:
    folder = resolve.resolve("org/whole", config_only=True, revision="main", progress=False)
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "llama"}
    assert sorted(hub) == sorted(ASSETS)


def test_code_and_pickles_are_fetched_when_they_are_asked_for(hub: list[str]) -> None:
    resolve.resolve("org/whole", code=True, allow_bin=True, progress=False)
    assert sorted(hub) == sorted([*ASSETS, *WEIGHTS, "modeling_own.py"]), "no pickles where there are safetensors"
    hub.clear()
    folder = resolve.resolve("org/pickles", allow_bin=True, progress=False)
    assert sorted(hub) == ["config.json", "pytorch_model.bin"] and resolve.commit_of(folder) == COMMIT
    hub.clear()
    resolve.resolve("org/bare", config_only=True, tokenizer=False, progress=False)
    assert hub == ["config.json"]


def test_refusals_of_the_hub(hub: list[str]) -> None:
    gated = refusal("org/gated")
    assert f"ask for it on {constants.ENDPOINT}/org/gated" in gated and "HF_TOKEN" in gated
    assert "org/unknown is neither a local folder nor a model on the hub" in refusal("org/unknown")
    assert "org/whole has no revision 'v9'" in refusal("org/whole", revision="v9")
    assert "must hold its weights as model*.safetensors; it has pytorch_model.bin" in refusal("org/pickles")
    assert "conversion.allow_bin=true" in refusal("org/pickles")
    assert "org/none must hold a config.json" in refusal("org/none")
    assert not hub


def test_an_unreachable_hub_is_told_in_seconds(silent: None) -> None:
    refusal("org/whole")  # pays for imports, which take long on a busy machine
    started = time.monotonic()
    message = refusal("org/whole")
    assert time.monotonic() - started < 2 * resolve.TIMEOUT
    assert "the hub can't be reached" in message and "set model.path to a local folder" in message


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_hub_its_cache_is_used(hub: list[str], monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    whole = resolve.resolve("org/whole", progress=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert resolve.resolve("org/whole") == whole
    (whole / WEIGHTS[0]).unlink()
    assert resolve.resolve("org/whole", config_only=True) == whole
    reason = "HF_HUB_OFFLINE is set" if offline else "the hub can't be reached"
    assert reason in refusal("org/whole")


def test_the_quickstart_model_comes_from_its_package_only_without_a_hub(
    silent: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGABRIDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(resolve, "TIMEOUT", 0.2)
    monkeypatch.setattr(quickstart, "fetch", lambda *, progress: tmp_path / "fetched")
    assert resolve.resolve(quickstart.HUB_ID, progress=False) == tmp_path / "fetched"
    assert "can't be reached" in refusal(quickstart.HUB_ID, revision="main")
    # Once made, it is used without asking.
    quickstart.folder().mkdir()
    monkeypatch.setattr(resolve, "_from_hub", None)
    assert resolve.resolve(quickstart.HUB_ID) == tmp_path / quickstart.MODEL
