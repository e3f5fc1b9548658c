"""A setting that nothing reads in a run is refused, by name and with what would read it; what nobody gave is not."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from megabridge.config.readers import READERS, RECIPES
from megabridge.config.schema import Config
from megabridge.errors import ConfigError
from megabridge.launchers.prepare import conf_folder, resolve
from tests.support.compose import compose
from tests.support.pages import COMMANDS

REFUSED = {
    "checkpoint.hf=true callbacks=none": "checkpoint.hf=True has no effect in this run: callbacks.hf_export",
    "conversion.output=out": "conversion.output='out' has no effect in this run: recipe=convert",
    "recipe=convert conversion.mode=verify conversion.folder=x conversion.output=out": "conversion.output='out'",
    "recipe=convert conversion.folder=x": "conversion.folder='x' has no effect in this run: recipe=convert conversion.mode=verify",
    "recipe=convert conversion.mode=import conversion.writer=gather": "conversion.writer='gather'",
    "callbacks=none conversion.max_shard_size=1GB": "conversion.max_shard_size='1GB'",
    "checkpoint.hf=false conversion.export_dtype=bfloat16": "conversion.export_dtype='bfloat16'",
    "peft=lora conversion.export_quantization=fp8_block": "conversion.export_quantization='fp8_block'",
    "model=tiny_llama conversion.dedupe=true": "conversion.dedupe=True has no effect in this run: an import of weights",
    "prepare.column=body": "prepare.column='body' has no effect in this run: recipe=prepare_data",
    "bench.repeats=9": "bench.repeats=9 has no effect in this run: recipe=bench",
    "sweep=multirun/x": "sweep='multirun/x'",
    "peft.r=8": "peft.r=8 has no effect in this run: peft=lora or peft=dora",
    "peft={r: 8, merge: true}": "peft.r=8",
    "recipe=convert checkpoint.save_every=5": "checkpoint.save_every=5 has no effect in this run: recipe=finetune and recipe=pretrain",
    "recipe=check family=megabridge.families.llama:FAMILY policy.limit=3": "policy.limit=3",
    "optimizer=sgd optimizer.beta1=0.8": "optimizer.beta1=0.8 has no effect in this run: optimizer=adam",
    "optimizer.momentum=0.5": "optimizer.momentum=0.5",
    "optimizer.loss_scale=8": "optimizer.loss_scale=8.0 has no effect in this run: model.dtype=float16",
    "scheduler.wsd_decay=cosine": "scheduler.wsd_decay='cosine'",
    "scheduler=constant scheduler.min_lr=1e-6": "scheduler.min_lr=1e-06",
    "policy.spike_factor=3": "policy.spike_factor=3.0",
    "model.tokenizer=bytes": "model.tokenizer='bytes' has no effect in this run: a model without model.path",
    "checkpoint.hf=false callbacks.answer.prompt=Why?": "callbacks.answer.prompt='Why?'",
}
TAKEN = (
    "callbacks=none",
    "checkpoint.hf=false",
    "checkpoint=none callbacks=none",
    "model=tiny_llama model.path=here",
    "scheduler=constant experiment=llama31_8b_lora recipe=convert data.path=x",
    "experiment=llama31_8b_sft data.path=x recipe=plan checkpoint.save_every=7 policy.spike=skip policy.limit=3",
    "checkpoint.hf=true callbacks=none +callbacks.mine._target_=mine.Exports",
    "recipe.target=tests.support.recipes:main prepare.column=body conversion.output=out checkpoint.save_every=5",
    "peft.r=16 prepare.column=text",
    "model.dtype=float16 optimizer.loss_scale=8",
    "peft=lora peft.merge=true conversion.export_quantization=fp8_block",
)


def run(overrides: Sequence[str]) -> None:
    resolve(compose(*overrides), Path("run"), overrides)


@pytest.mark.parametrize("given", REFUSED)
def test_what_nothing_reads_is_refused(given: str) -> None:
    overrides = [given] if "{" in given else given.split()
    with pytest.raises(ConfigError) as caught:
        run(overrides)
    assert str(caught.value).startswith(REFUSED[given]) and "remove it" in str(caught.value), caught.value


def test_what_is_read_or_was_not_given_is_taken() -> None:
    for given in TAKEN:
        run(given.split())


def test_all_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        run(["peft.r=8", "prepare.column=body", "optimizer.momentum=0.5"])
    assert [line.split("=")[0].strip() for line in str(caught.value).splitlines()] == [
        "prepare.column",
        "peft.r",
        "optimizer.momentum",
    ]


def test_a_users_own_file_counts(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    given = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]
    file.write_text("# @package _global_\npeft: {r: 8}\ncheckpoint: {save_every: 500}\n")
    with pytest.raises(ConfigError, match=r"^peft\.r=8 has no effect"):
        run(given)
    file.write_text("# @package _global_\ncheckpoint: {save_every: 500, keep_last: 3}\n")
    run([*given, "recipe=convert"])  # a training run's file is what its model is converted with, too


def test_the_table_names_what_there_is() -> None:
    assert sorted(RECIPES) == sorted(file.stem for file in (conf_folder() / "recipe").glob("*.yaml"))
    for name in (name for reader in READERS for name in reader.settings if not name.startswith("callbacks.")):
        node: object = Config()
        for part in name.split("."):
            assert is_dataclass(node) and part in {each.name for each in fields(node)}, name
            node = getattr(node, part)


def test_commands_of_the_documentation_set_nothing_that_is_not_read() -> None:
    for command in COMMANDS:
        overrides = shlex.split(command)[3:]
        if not {"-m", "--config-dir"} & set(overrides) and not any("my_" in text for text in overrides):
            run(overrides)
