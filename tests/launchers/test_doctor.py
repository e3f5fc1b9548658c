"""What is found here, and what a gap is told with; no torch in this process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megabridge.launchers import doctor
from megabridge.parallel import hardware
from tests.support.command import command

PROBE = {"version": "2.12", "cuda": None, "available": False, "gloo": True, "nccl": None, "devices": []}


def findings(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, tuple[str, str]], str]:
    status = doctor.main()
    out = capsys.readouterr().out
    return status, {line[5:19].strip(): (line[:4].strip(), line[20:]) for line in out.splitlines()}, out


def test_this_host_is_looked_at_without_torch_in_the_parent(tmp_path: Path) -> None:
    answer = command("doctor", cwd=tmp_path, env={"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_secret", "CUDA_VISIBLE_DEVICES": ""})
    lines = answer.stdout.splitlines()
    for what in (
        "megabridge",
        "python",
        "torch",
        "megatron-core",
        "transformers",
        "cpu",
        "backends",
        "hub",
        "runs' disk",
        "open files",
    ):
        assert any(re.match(rf"(ok  |note|GAP ) {what} ", line) for line in lines), (what, answer.stdout)
    assert "a token is there" in answer.stdout and "hf_secret" not in answer.stdout + answer.stderr
    assert answer.returncode == int("GAP" in answer.stdout) and not list(tmp_path.iterdir())


def test_a_gap_has_its_remedy_and_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(doctor, "_torch", lambda: PROBE)
    monkeypatch.setattr(hardware, "visible_gpus", lambda: 0)
    status, found, _ = findings(capsys)
    monkeypatch.setattr(hardware, "visible_gpus", lambda: 2)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "safetensors" else "0.1" if name == "hydra-core" else "99")
    worse, gaps, out = findings(capsys)
    assert worse == 1 and gaps["safetensors"] == ("GAP", "not installed") and gaps["hydra-core"][0] == "GAP"
    assert "-> pip install 'safetensors>=0.6.2'" in out and "-> pip install 'hydra-core>=1.3.2'" in out
    assert gaps["gpu"] == ("GAP", "2 here, which torch 2.12 can't use: it is for CPUs only") and "a torch for CUDA" in out
    assert "auto is torch" in found["backends"][1] and found["safetensors"][0] == "ok" and status in (0, 1)
    monkeypatch.setattr(doctor, "_torch", lambda: "ImportError: libcudart.so.13")
    _, gaps, out = findings(capsys)
    assert "GAP  torch          can't be imported: ImportError: libcudart.so.13" in out


def test_a_hub_that_does_not_answer_is_a_note(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_torch", lambda: PROBE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    _, found, out = findings(capsys)
    assert found["hub"][0] == "note" and "can't be reached" in found["hub"][1] and "check the network" in out
