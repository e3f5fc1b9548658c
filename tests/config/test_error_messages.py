"""What Hydra and OmegaConf raise at odd overrides, in one line that names the key; composed in this process."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from megabridge.config import error_messages, synonyms
from megabridge.errors import ConfigError
from megabridge.launchers import run_lock
from megabridge.launchers.prepare import conf_folder, resolve, write_config
from megabridge.loggers.wandb import WandB
from tests.support.compose import compose

COMPOSED = {
    "recipe.answer_prompt=Why?": "unknown key 'recipe.answer_prompt': it is callbacks.answer.prompt now",
    "model.hf={a: 1}": "unknown key 'model.hf.a'. To add it, write +model.hf.a=...",
    "model.hf={rope_parameters: {x: 1}}": "unknown key 'model.hf.rope_parameters.x'; did you mean 'model.hf.rope_parameters",
    "optimizer={lr: 1, lrr: 2}": "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?",
    "parallel.qqqqqqqq=3": "unknown key 'parallel.qqqqqqqq'; in parallel there are",
    "zzzzzzz=3": "unknown key 'zzzzzzz'; at the top there are model, parallel,",
    "model.hf=[1]": "model.hf: Cannot merge DictConfig with ListConfig; give it a value of its type.",
    "~optimizer.lr": "optimizer.lr: OptimizerConfig (DictConfig) does not support deletion; give it a value",
    "optimizer.lr={a: 1}": "optimizer.lr: \"{'a': 1}\" must be a number.",
}
SAID_ELSEWHERE = {
    "optimizer.learning_rate=1": "unknown key 'optimizer.learning_rate': it is optimizer.lr.",
    "learning_rate=1": "unknown key 'learning_rate': it is optimizer.lr.",
    "recipe.batch_size=4": "unknown key 'recipe.batch_size': recipe.global_batch_size=N is the sequences of a step",
    "per_device_train_batch_size=1": "unknown key 'per_device_train_batch_size': it is recipe.micro_batch_size; recipe.global_batch_size =",
    "recipe.gradient_accumulation_steps=8": "unknown key 'recipe.gradient_accumulation_steps': set recipe.global_batch_size = recipe.micro",
    "num_train_epochs=3": "unknown key 'num_train_epochs': it is recipe.epochs.",
    "peft.lora_rank=8": "unknown key 'peft.lora_rank': it is peft.r.",
    "lora_r=8": "unknown key 'lora_r': it is peft.r.",
    "max_seq_length=8": "unknown key 'max_seq_length': it is recipe.seq_length.",
    "max_steps=8": "unknown key 'max_steps': it is recipe.steps.",
    "bf16=true": "unknown key 'bf16': set model.dtype=bfloat16.",
    "model.fp16=true": "unknown key 'model.fp16': set model.dtype=float16.",
    "optimizer.warmup_ratio=0.1": "unknown key 'optimizer.warmup_ratio': set scheduler.warmup_steps = warmup_ratio x recipe.steps.",
    "optimizer.warmup_steps=1": "unknown key 'optimizer.warmup_steps'; did you mean 'scheduler.warmup_steps'?",
    "output_dir=x": "unknown key 'output_dir': it is run_dir; saves go to its checkpoints",
    "model.model_name_or_path=x": "unknown key 'model.model_name_or_path': set model=auto model.path=<folder or hub id>",
    "dataset=x": "unknown key 'dataset': set data=chat data.path=<file, folder or hub id>.",
    "parallel.tp_size=2": "unknown key 'parallel.tp_size': it is parallel.tp.",
    "tensor_model_parallel_size=2": "unknown key 'tensor_model_parallel_size': it is parallel.tp.",
    "save_steps=2": "unknown key 'save_steps': it is checkpoint.save_every.",
    "logger.wandb.run_name=x": "unknown key 'logger.wandb.run_name': it is +logger.wandb.name.",
    "data.max_length=8": "unknown key 'data.max_length': it is recipe.seq_length.",
    "model.provider.tensor_model_parallel_size=2": "unknown key 'model.provider.tensor_model_parallel_size'",
    "recipe.global_bach_size=1": "unknown key 'recipe.global_bach_size'; did you mean 'recipe.global_batch_size'?",
    "optimizer=adamw": "optimizer=adamw does not exist: it is optimizer=adam here.",
    "scheduler=cosine_with_warmup": "scheduler=cosine_with_warmup does not exist: it is scheduler=cosine here.",
    "peft=qlora": "peft=qlora does not exist: it is peft=lora here.",
    "recipe=sft": "recipe=sft does not exist: it is recipe=finetune here.",
}
RESOLVED = {
    "+conversion.logits_tokens=8": "unknown key 'conversion.logits_tokens': it is callbacks.import_parity.logits_tokens and callbacks.hf",
    "++optimizer.lrr=3": "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?",
    "model.hf=${oc.decode:x}": "model.hf: Cannot assign str to Dict[str, Any]",
    "peft.target_modules=${oc.decode:x}": "peft.target_modules: Invalid value assigned: AnyNode is not a ListConfig",
    "seed=${model.name}": "seed: While dereferencing interpolation '${model.name}': Value 'tiny_llama' of type 'str' could not be",
    "seed=${oc.env:NOT_SET_AT_ALL}": 'seed: KeyError raised while resolving interpolation: "Environment variable',
    "model.name=???": "model.name has no value; set it with model.name=...",
    "run_dir=???": "run_dir has no value; set it with run_dir=...",
    "optimizer.lr=nan": "optimizer.lr=nan must be a finite number; set one, or remove the setting",
    "+callbacks.x={_target_: a.B, y: [inf]}": "callbacks.x.y[0]=inf must be a finite number",
    "model.path='a\0b'": "model.path=a\0b can't be looked up (embedded null byte); name another path.",
}


def test_overrides_that_hydra_refuses_are_explained() -> None:
    for override, said in (COMPOSED | SAID_ELSEWHERE).items():
        with pytest.raises(Exception) as caught:
            compose("model=tiny_llama", override)
        text = error_messages.explain(caught.value, conf_folder())
        assert text.startswith(said) and "\n" not in text, (override, text)


def test_what_synonyms_lead_to_is_there() -> None:
    """Every key of ours, every choice, and every command that a sentence has."""
    known = set(error_messages._known_keys("data.x", conf_folder())) | set(error_messages._known_keys("logger.x", conf_folder()))
    known |= set(error_messages._known_keys("callbacks.x", conf_folder()))
    known |= {f"+logger.wandb.{name}" for name in inspect.signature(WandB).parameters}
    assert not [key for key in synonyms._GROUPS if key not in known]
    for group, choices in synonyms.CHOICES.items():
        for choice in choices:
            assert (conf_folder() / group / f"{choice}.yaml").is_file(), (group, choice)
    for said in synonyms._OTHERWISE.values():
        for key, value in re.findall(r"(?<![\w.+])(\+?[a-z_]+(?:\.[a-z_]+)*)=([\w.<>]+)", said):
            assert key.startswith("+model.provider.") or key in known or (conf_folder() / key / f"{value}.yaml").is_file(), (
                key,
                said,
            )


def test_flags_that_are_settings_are_explained() -> None:
    said = synonyms.of_flags(["--learning_rate", "1e-4"])
    assert said == "settings are written key=value, without dashes: --learning_rate: it is optimizer.lr."
    assert "model.dtype=bfloat16" in str(synonyms.of_flags(["--bf16"])) and "peft.r" in str(synonyms.of_flags(["--lora-rank=8"]))
    assert synonyms.of_flags(["--cfg", "job", "--multirun", "seed=1", "-cd", "--config-dir=x", "--version"]) is None


def test_values_that_can_only_be_judged_when_all_is_known() -> None:
    for override, said in RESOLVED.items():
        with pytest.raises(ConfigError) as caught:
            resolve(compose("model=tiny_llama", override))
        text = str(caught.value)
        assert text.startswith(said) and "\n" not in text, (override, text)


def test_a_run_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").symlink_to(tmp_path / "nowhere")
    (tmp_path / "taken" / "config.yaml").mkdir(parents=True)
    cfg = compose("model=tiny_llama")
    for name, reason in {
        "file": "File exists",
        "file/below": "Not a directory",
        "empty": "File exists",
        "taken": "Is a dir",
    }.items():
        values, _ = resolve(cfg, tmp_path / name)
        said = rf"^run_dir={tmp_path / name} must be a folder that can be made .* but: {reason}"
        with pytest.raises(ConfigError, match=said), run_lock.claimed(tmp_path / name):
            write_config(cfg, values)
    error = FileExistsError(17, "File exists", "out")
    assert error_messages.explain(error, conf_folder()).startswith(
        "a run's directory must be a folder that can be made, but 'out': File"
    )
    error = PermissionError(13, "Permission denied", "conf/a.yaml")
    assert error_messages.explain(error, conf_folder()).startswith(
        "a config must be a file that can be read, but 'conf/a.yaml': Perm"
    )
