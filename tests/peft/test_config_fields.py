"""adapter_config.json, key by key: every field of PEFT's has a meaning here, and what can't be is refused in a sentence."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megabridge.errors import CheckpointError, ConfigError, MegabridgeError
from megabridge.hf.safetensors_format import TensorInfo
from megabridge.peft import LoRA, config_fields
from megabridge.peft.folder import check_rank, read_config

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def written(folder: Path, content: Any) -> Path:
    (folder / "adapter_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_every_field_of_peft_has_a_meaning(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    known = {each.name for each in dataclasses.fields(peft.LoraConfig)}
    assert known <= config_fields.FIELDS.keys(), "say in megabridge/peft/config_fields.py what the new ones mean"
    peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    assert read_config(tmp_path) == LoRA(target_modules=("q_proj",), r=4, lora_alpha=8.0)


def test_what_changes_nothing_is_taken(tmp_path: Path) -> None:
    harmless = {
        "layers_to_transform": [0, 1], "layers_pattern": "layers", "fan_in_fan_out": True, "init_lora_weights": "Gaussian",
        "loftq_config": {"loftq_bits": 4}, "eva_config": None, "exclude_modules": ".*head", "target_modules": ".*q_proj",
        "rank_pattern": {}, "some_later_field": None, "another": {}, "third": False, "lora_dropout": None, "use_rslora": None,
    }  # fmt: skip
    assert read_config(written(tmp_path, PLAIN | harmless)) == LoRA(r=4, lora_alpha=8.0)


REFUSED: dict[str, list[Any]] = {
    "init_lora_weights": ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "PISSA", "unheard-of", 1, []],
    "r": [10**9, 0, -1, "4", 4.0, True, None, math.nan, [4], 10**400],
    "lora_alpha": [math.nan, math.inf, -math.inf, "8", True, None, {}, 1e300, 10**400],
    "lora_dropout": [1, -0.1, math.nan, "0", True],
    "use_rslora": ["false", 0, 1, "yes", []],
    "use_dora": ["true", 0.0, {}],
    "fan_in_fan_out": ["false", 1],
    "bias": ["all", "lora_only", "None", True, 1, []],
    "rank_pattern": [{"q_proj": 8}, {"(": 8}, {"(a+)+$": "x"}, {"q_proj": math.nan}, ["q_proj"], 0, "q"],
    "alpha_pattern": [{"q_proj": 8}, {"q_proj": None}, 1],
    "target_modules": [1, {"q_proj": 1}, [1], [None], ["q_proj", ["v_proj"]], True],
    "target_parameters": ["experts.down_proj", [1], {}],
    "exclude_modules": [1, [{}], {}],
    "modules_to_save": [["lm_head"], "lm_head", {"a": 1}, 1, True],
    "layers_to_transform": ["all", [None], [-1], 1.5, {}],
    "peft_type": ["IA3", "lora", None, 1, ["LORA"]],
    "layer_replication": [[[0, 2], [1, 3]], 1],
    "some_later_field": [True, 1, {"a": 1}, [0], "x", 0.5],
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_can_not_be_is_one_sentence(tmp_path: Path, key: str) -> None:
    for value in REFUSED[key]:
        with pytest.raises(ConfigError) as raised:
            read_config(written(tmp_path, PLAIN | {key: value} if value != 10**400 else PLAIN | {key: 10**4000}))
        said = str(raised.value)
        assert str(tmp_path) in said and key in said and len(said.splitlines()) == 2, said


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        read_config(written(tmp_path, {"use_dora": "yes", "bias": "all", "later": 1}))
    said = str(raised.value)
    assert all(key in said for key in ("'r'", "'lora_alpha'", "use_dora='yes'", "bias='all'", "'later': 1"))
    with pytest.raises(ConfigError, match=r"lora_dropout=0\.5 must be 0 with use_dora"):
        read_config(written(tmp_path, PLAIN | {"use_dora": True, "lora_dropout": 0.5}))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "3", "{", '{"r": 4, "r": 8, "lora_alpha": 8}', "[" * 10**5, '{"later": ' + "[" * 60 + "]" * 60 + "}"],
)
def test_a_file_that_is_no_such_object(tmp_path: Path, content: str) -> None:
    with pytest.raises(MegabridgeError) as raised:
        read_config(written(tmp_path, content))
    assert "adapter_config.json" in str(raised.value) and len(str(raised.value)) < 1000


def test_a_file_that_is_huge_or_none(tmp_path: Path) -> None:
    os.truncate(written(tmp_path, "{}") / "adapter_config.json", 1 << 34)
    with pytest.raises(CheckpointError, match="bytes, and may have"):
        read_config(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(CheckpointError, match=r"must hold adapter_config\.json"):
        read_config(tmp_path)


def test_tensors_of_another_rank(tmp_path: Path) -> None:
    def info(module: str, ending: str, *shape: int) -> tuple[str, TensorInfo]:
        name = f"base_model.model.{module}.{ending}"
        return name, TensorInfo(name, tmp_path, torch.float32, shape, 0)

    good = dict([info("q", "lora_A.weight", 4, 9), info("q", "lora_B.weight", 7, 4), info("q", "lora_magnitude_vector", 7)])
    stacked = dict([info("experts", "lora_A.weight", 12, 9), info("experts", "lora_B.weight", 7, 12)])
    check_rank(good | stacked, 4, is_stacked=True)
    wrong = [info("q", "lora_A.weight", 9, 4), info("q", "lora_B.weight", 4), info("q", "lora_magnitude_vector", 7, 1)]
    with pytest.raises(CheckpointError) as raised:
        check_rank(dict([*wrong, *stacked.items()]), 4, is_stacked=False)
    assert len(str(raised.value).splitlines()) == 6
