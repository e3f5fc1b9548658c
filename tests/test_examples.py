"""docs/autobridge.md, run as it stands but for the model's name: its Python in ranks, its shell commands in processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pages import ENVIRONMENT, ROOT, blocks
from tests.support.payload import payload
from tests.support.rank_server import RankServer

PAGE = [block.lstrip() for block in blocks(ROOT / "docs" / "autobridge.md")]
MODEL = "meta-llama/Llama-3.2-1B"
SHELL = [line for block in PAGE for line in block.splitlines() if line.startswith(("python -c", "torchrun"))]
PYTHON = [block for block in PAGE if block.startswith(("from ", "import "))]
NATIVE = [block for block in PYTHON if '"native"' in block]
LAYOUT = next(block for block in PYTHON if "tensor_model_parallel_size = 8" in block)


@pytest.fixture(scope="module")
def model(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "model"
    ranks.run("tests.support.examples:make_source", kwargs={"folder": str(folder)})
    return folder


def python(ranks: RankServer, code: list[str], model: Path, folder: Path, *, world_size: int = 1) -> list[list[str]]:
    kwargs = {"code": [block.replace(MODEL, str(model)) for block in code], "folder": str(folder)}
    return ranks.run("tests.support.examples:blocks", world_size=world_size, kwargs=kwargs)


def shell(command: str, model: Path, folder: Path) -> str:
    environment = ENVIRONMENT | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
    }
    command = command.replace(MODEL, str(model))
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + "\n" + done.stderr


def test_the_page_is_whole() -> None:
    text = (ROOT / "docs" / "autobridge.md").read_text()
    used = sum(len(block.strip().splitlines()) for block in [*PYTHON]) + len(SHELL)
    code = [line for line in text.splitlines() if line.startswith("    ") and line.strip()]
    blank = sum(line == "" for block in PYTHON for line in block.strip().splitlines())
    assert used - blank == len(code), "every line of code on the page is run"


def test_python_in_one_process(ranks: RankServer, model: Path, tmp_path: Path) -> None:
    (printed,) = python(ranks, [block for block in PYTHON if block not in NATIVE], model, tmp_path)
    which, loaded, typed, layout, exported, streamed, config = printed
    assert "LlamaForCausalLM" in which and "True" in which
    assert "0 mismatched" in loaded and typed.strip() == "{torch.bfloat16}"
    assert "needs 16 processes" in layout and "torchrun --nproc-per-node=16" in layout
    assert exported.strip() == config.strip() == "64"
    shapes = [f"{name} {shape}" for name, (_, shape, _) in payload(tmp_path / "exported").items()]
    assert streamed.splitlines() == [*shapes, f"{len(shapes)} tensors"]
    for folder in ("exported", "weights"):
        assert payload(tmp_path / folder) == payload(model)
    assert (tmp_path / "exported" / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_the_layout_in_four_processes(ranks: RankServer, model: Path, tmp_path: Path) -> None:
    """The page's sixteen, with smaller sizes."""
    block = (
        LAYOUT.replace("tensor_model_parallel_size = 8", "tensor_model_parallel_size = 2")
        + "print(len(model), bridge.import_report)\n"
    )
    for printed in python(ranks, [block], model, tmp_path, world_size=4):
        assert printed[0].startswith("1 ") and "0 mismatched" in printed[0]


@pytest.mark.grid
def test_shell_and_native_checkpoints(ranks: RankServer, model: Path, tmp_path: Path) -> None:
    importing, exporting, generating = SHELL
    shell(importing, model, tmp_path)
    shell(exporting, model, tmp_path)
    (printed,) = python(ranks, NATIVE, model, tmp_path)
    assert "0 mismatched" in printed[0] and printed[1] == ""
    for folder in ("published", "published-again"):
        assert payload(tmp_path / folder) == payload(model)
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (tmp_path / folder / name).read_bytes() == (model / name).read_bytes()
    assert (tmp_path / "native-float32" / ".metadata").is_file()
    text = ranks.run(
        "tests.support.examples:greedy", kwargs={"folder": str(model), "prompt": "The capital of France is", "new_tokens": 20}
    )[0]
    assert len(text) > len("The capital of France is") and text in shell(generating, model, tmp_path)
