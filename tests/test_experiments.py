"""Every ready experiment composes, needs the memory that it says, and runs in tiny form where it is sized for a CPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megabridge.config import schema, validation
from megabridge.families.core.known_sizes import known_sizes
from tests.support.command import ROOT
from tests.support.compose import compose
from tests.support.rank_server import RankServer

FOLDER = ROOT / "conf" / "experiment"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
SAID = re.compile(r"Expected memory: ([\d.]+) GiB on each of (\d+) GPU")
ON_GPUS = [name for name in NAMES if SAID.search((FOLDER / f"{name}.yaml").read_text())]
TINY = "recipe.steps=2 recipe.seq_length=64 callbacks.import_parity.logits_tokens=8 callbacks.hf_export.logits_tokens=8 logger=local platform=cpu"
ON_CPU = {
    "smollm2_sft_export": f"model=tiny_llama {TINY}",
    "smollm2_lora": f"model=tiny_llama {TINY}",
    "smollm2_pretrain": f"model=tiny_llama {TINY}",
    "tiny_smoke": "platform=cpu",
    "tiny_moe": "platform=cpu",
}


@pytest.fixture(scope="module")
def composed() -> Mapping[str, dict[str, Any]]:
    given = {name: ["data.path=x.jsonl"] if name in ON_GPUS else [] for name in NAMES}
    return {name: OmegaConf.to_container(compose(f"experiment={name}", *more), resolve=True) for name, more in given.items()}  # type: ignore[misc]


def test_all_are_of_one_kind() -> None:
    assert set(NAMES) == {*ON_GPUS, *ON_CPU, "llama32_1b_h100"}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_composed_can_run(composed: Mapping[str, dict[str, Any]], name: str) -> None:
    made = schema.typed(composed[name])
    for check in (
        validation.check_choices,
        validation.check_targets,
        validation.check_model,
        validation.check_peft,
        validation.check_training,
    ):
        check(made)
    validation.check_layout(made, schema.topology(made.parallel), known_sizes(made.model))


def test_expected_memory_is_what_is_said(ranks: RankServer, composed: Mapping[str, dict[str, Any]]) -> None:
    found, said = {}, {}
    for name in ON_GPUS:
        values = composed[name]
        (stages,) = ranks.run("tests.support.expected_memory:expected", world_size=1, kwargs={"values": values})
        world = schema.topology(schema.typed(values).parallel).world_size
        found[name] = (f"{max(sum(stage.values()) for stage in stages) / 2**30:.1f}", str(world))
        match = SAID.search((FOLDER / f"{name}.yaml").read_text())
        assert match is not None
        said[name] = match.groups()
    assert found == said
    table = (ROOT / "docs" / "training.md").read_text()
    rows = {name: f"`{name}`, {count} GPU{'s' if count != '1' else ''} | {memory} |" for name, (memory, count) in found.items()}
    assert not [row for row in rows.values() if row not in table]


@pytest.mark.parametrize("name", ON_CPU)
def test_those_for_a_cpu_run_in_tiny_form(ranks: RankServer, tmp_path: Path, name: str) -> None:
    done = ranks.program([f"experiment={name}", *ON_CPU[name].split(), "run_dir=run"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    published = [file.parent.name for file in (tmp_path / "run" / "checkpoints").glob("step_*/*/*.safetensors")]
    assert set(published) == {"adapter" if name == "smollm2_lora" else "hf"}
