"""docs/adding-a-family.md, done: its files and commands as they stand there, and a family that an installed package brings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from textwrap import dedent

import pytest

from tests.support.pages import COMMANDS, PYTHON, ROOT, blocks
from tests.support.rank_server import RankServer

PAGE = ROOT / "docs" / "adding-a-family.md"
BLOCKS = blocks(PAGE)
PROGRAM = "python -m megabridge.run "
OWN = [line for block in BLOCKS for line in block.splitlines() if line.startswith(PROGRAM)]
PUBLISHED = {
    "architectures": ["CwmForCausalLM"], "model_type": "cwm", "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "hidden_act": "silu",
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "sliding_window": 16, "mlp_bias": False, "tie_word_embeddings": False,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "torch_dtype": "float32", "bos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip


def block(beginning: str) -> str:
    (found,) = [text for text in BLOCKS if text.lstrip().startswith(beginning)]
    return found


def run(ranks: RankServer, arguments: str, folder: Path, *, path: str = "", fails: bool = False) -> str:
    done = ranks.program(arguments, cwd=folder, environ={"PYTHONPATH": path})
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files and the model that it speaks of."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("work")
    (folder / "my_family.py").write_text(PYTHON["docs/adding-a-family.md"])
    (folder / "my_conf" / "model").mkdir(parents=True)
    (folder / "my_conf" / "model" / "cwm_tiny.yaml").write_text(block("# A small CWM"))
    source = folder / "path/to/cwm"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(PUBLISHED))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained(source)
    (source / "config.json").write_text(json.dumps(PUBLISHED))
    return folder


def test_the_pages_commands_and_a_draft_that_passes_unchanged(ranks: RankServer, work: Path, tmp_path: Path) -> None:
    assert len(OWN) == 5 and set(OWN) <= set(COMMANDS)
    (draft,) = [line for line in OWN if "recipe=draft" in line]
    check_draft(ranks, draft, shutil.copytree(work, tmp_path / "draft"))
    check_broken(ranks, shutil.copytree(work, tmp_path / "broken"))
    for number, line in enumerate(OWN):
        if line == draft:
            continue
        text = run(ranks, line.removeprefix(PROGRAM), shutil.copytree(work, tmp_path / str(number)))
        if "parallel.dp=2" in line:
            rows = {row.split("] ")[1].split("  ")[0] for row in text.splitlines() if "] " in row}
            assert {"tiny config", "dp2", "tp2", "tp2sp", "pp2", "pp2vpp2", "model", "model, dp2", "model, pp2"} <= rows
        if "recipe=compare" in line:
            assert "no module differs" in text and "not compared" not in text


def check_draft(ranks: RankServer, line: str, folder: Path) -> None:
    output = run(ranks, line.removeprefix(PROGRAM), folder)
    assert "TODO" not in output and "next: PYTHONPATH=" in output
    run(ranks, "recipe=check model.path=path/to/cwm family=drafted:FAMILY", folder)


def check_broken(ranks: RankServer, folder: Path) -> None:
    broken = (folder / "my_family.py").read_text().replace("layer % 4 != 0", "layer % 4 == 0").replace("GATED_SILU,", "", 1)
    (folder / "broken.py").write_text(
        broken.replace("*GATED_SILU", 'Fixed("gated_linear_unit", False)').replace("Field\n", "Field, Fixed\n")
    )
    output = run(ranks, "recipe=check family=broken:FAMILY", folder, fails=True)
    assert "checks of CwmForCausalLM failed" in output and "single, bijection: " in output


def test_the_pages_conf_entry_trains(ranks: RankServer, work: Path) -> None:
    arguments = "--config-dir my_conf model=cwm_tiny family=my_family:FAMILY recipe=pretrain data=random_tokens"
    output = run(ranks, f"{arguments} recipe.steps=2 recipe.seq_length=32 logger=local callbacks=none checkpoint=none", work)
    assert "CwmForCausalLM: single" in output and "step 2/2" in output


def test_a_family_of_an_installed_package(ranks: RankServer, tmp_path: Path) -> None:
    """An entry point, layers and a conf entry of its own; the package lies on PYTHONPATH as pip would have put it there."""
    files = {
        "outside/__init__.py": "",
        "outside/layers.py": block("import megabridge.models.layers.attention") + dedent(LAYER_SPEC),
        "outside/family.py": dedent(FAMILIES),
        "outside/conf/__init__.py": "",
        "outside/conf/model/outside_tiny.yaml": dedent(CONF),
        "outside-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n",
        "outside-1.0.dist-info/entry_points.txt": "[megabridge.families]\ngpt2 = outside.family:FAMILY\n",
    }
    for name, text in files.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text)
    site = str(tmp_path / "site")
    for name in "abc":
        (tmp_path / name).mkdir()
    own = "hydra.searchpath=[pkg://outside.conf] model=outside_tiny recipe=check parallel=tp2"
    checked = run(ranks, own, tmp_path / "a", path=site)
    assert "tp2sp" in checked and "pp2vpp2" in checked
    run(ranks, "recipe=check family=outside.family:BY_SPEC parallel=pp2", tmp_path / "b", path=site)
    plain = run(ranks, "recipe=compare family=outside.family:PLAIN", tmp_path / "c", path=site, fails=True)
    assert "first difference in transformer.h.1.attn: what it computes before transformer.h.1.attn.c_proj" in plain


FAMILIES = """\
    from dataclasses import replace

    from megabridge.families.core.fields import Fixed, RequiredValue
    from megabridge.families.gpt2 import FAMILY as GPT2

    KEY = "scale_attn_by_inverse_layer_idx"
    FIELDS = (*(field for field in GPT2.fields if KEY not in field.keys()), RequiredValue(KEY, (True,)))
    PLAIN = replace(GPT2, fields=FIELDS, tiny={**GPT2.tiny, KEY: True})
    FAMILY = replace(PLAIN, fields=(*FIELDS, Fixed("core_attention", "outside.layers:ScaledAttention")))
    BY_SPEC = replace(PLAIN, fields=(*FIELDS, Fixed("transformer_layer_spec", "outside.layers:spec")))
"""
LAYER_SPEC = """

    def spec(config):
        from dataclasses import replace

        from megabridge.models.backends import backend
        from megabridge.models.layer_options import LayerOptions

        made = backend("torch").layer(config, LayerOptions(add_attn_proj_bias=True, add_mlp_bias=True))
        attention = made.submodules.self_attention
        own = replace(attention, submodules=replace(attention.submodules, core_attention=ScaledAttention))
        return replace(made, submodules=replace(made.submodules, self_attention=own))
"""
CONF = """\
    # A model of the package.
    name: outside_tiny
    tokenizer: bytes
    load_weights: false
    hf:
      architectures: [GPT2LMHeadModel]
      model_type: gpt2
      n_embd: 64
      n_layer: 3
      n_head: 8
      vocab_size: 260
      n_positions: 64
      scale_attn_by_inverse_layer_idx: true
      tie_word_embeddings: true
"""
