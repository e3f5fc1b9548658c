"""What Hydra and OmegaConf raise at odd overrides, in one line that names the key; composed in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabridge.config import error_messages
from megabridge.errors import ConfigError
from megabridge.launchers import run_lock
from megabridge.launchers.prepare import conf_folder, resolve, write_config
from tests.support.compose import compose

COMPOSED = {
    "recipe.answer_prompt=Why?": "unknown key 'recipe.answer_prompt': it is callbacks.answer.prompt now",
    "model.hf={a: 1}": "unknown key 'model.hf.a'. To add it, write +model.hf.a=...",
    "model.hf={rope_parameters: {x: 1}}": "unknown key 'model.hf.rope_parameters.x'; did you mean 'model.hf.rope_parameters",
    "optimizer={lr: 1, lrr: 2}": "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?",
    "parallel.qqqqqqqq=3": "unknown key 'parallel.qqqqqqqq'; in parallel there are cp, dp, ep, etp, layout, pp, sequence_parallel, tp, vpp.",
    "zzzzzzz=3": "unknown key 'zzzzzzz'; at the top there are model, parallel,",
    "model.hf=[1]": "model.hf: Cannot merge DictConfig with ListConfig; give it a value of its type.",
    "~optimizer.lr": "optimizer.lr: OptimizerConfig (DictConfig) does not support deletion; give it a value",
    "optimizer.lr={a: 1}": "optimizer.lr: \"{'a': 1}\" must be a number.",
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
    for override, said in COMPOSED.items():
        with pytest.raises(Exception) as caught:
            compose("model=tiny_llama", override)
        text = error_messages.explain(caught.value, conf_folder())
        assert text.startswith(said) and "\n" not in text, (override, text)


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
