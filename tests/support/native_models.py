"""What processes do with native checkpoints in the bridge's tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megabridge import AutoBridge
from megabridge.errors import MegabridgeError
from megabridge.hf import assets, byte_tokenizer
from megabridge.native import checkpoint
from megabridge.native.source_record import FILE
from megabridge.parallel import process_groups
from tests.support.bridge import refusal
from tests.support.convert import provide
from tests.support.damage import foreign as as_foreign
from tests.support.models import TINY, write_model

TIED: dict[str, Any] = {**TINY, "vocab_size": 301, "tie_word_embeddings": True, "dtype": "bfloat16"}


def make_source(folder: str) -> None:
    """A tied model with its redundant lm_head, norms in fp32, a tokenizer, a chat template and a generation config."""
    from safetensors.torch import load_file, save_file

    path = write_model(Path(folder), TIED)
    tensors = load_file(path / "model.safetensors")
    tensors = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors")
    byte_tokenizer.write_tokenizer(path)
    (path / "generation_config.json").write_text('{"do_sample":  false}')


def one_process(source: str, out: str) -> dict[str, Any]:
    """The whole way there and back in a process without set-up, the source deleted half-way."""
    root, native_folder = Path(out), Path(out) / "native"
    native_folder.mkdir(parents=True)  # empty folders are taken
    too_few = refusal(lambda: AutoBridge.import_ckpt(source, native_folder, tp=2))
    imported = AutoBridge.import_ckpt(source, native_folder, show_progress=False)
    seen: dict[str, Any] = {"imported": imported.mismatched, "groups": process_groups.current() is None}
    config = assets.read_config(Path(source))
    shutil.copytree(source, root / "kept")
    shutil.rmtree(source)
    bridge = AutoBridge.from_hf_config(config)
    exported = bridge.export_ckpt(native_folder, root / "out", False)
    seen |= {"exported": exported.mismatched, "groups again": process_groups.current() is None}
    seen["left"] = sorted(path.name for path in root.iterdir())
    seen["assets"] = sorted(path.name for path in (native_folder / checkpoint.ASSETS).iterdir())
    # What the checkpoint carries is enough; a step's folder names it too.
    (root / "step_4").mkdir()
    shutil.copytree(native_folder, root / "step_4" / "native")
    own = AutoBridge.from_auto_config(root / "step_4")
    own.export_ckpt(root / "step_4", root / "float", False, weight_dtype="float32", max_shard_size="50KB")
    model = bridge.load_megatron_model(root, dtype="float32")
    seen["dtypes"] = [str(kind) for kind in _dtypes(model)] + [str(kind) for kind in _dtypes(bridge.load_megatron_model(root))]
    bridge.save_hf_pretrained(model, root / "loaded", False, weight_dtype="source", source_path=root / "kept")
    seen["refusals"] = {**_refusals(bridge, root, config, model), "processes": too_few}
    return seen


def _dtypes(model: list[torch.nn.Module]) -> set[torch.dtype]:
    return {parameter.dtype for chunk in model for parameter in chunk.parameters()}


def _refusals(bridge: AutoBridge, root: Path, config: dict[str, Any], model: list[torch.nn.Module]) -> dict[str, str]:
    foreign = root / "foreign"
    shutil.copytree(root / "native", foreign)
    shutil.rmtree(foreign / checkpoint.ASSETS)
    as_foreign(foreign)
    broken = root / "broken"
    shutil.copytree(root / "native", broken)
    (broken / checkpoint.ASSETS / FILE).write_text('{"format": 1, "dtype": "os.system"}')
    damaged = refusal(lambda: bridge.export_ckpt(broken, root / "x"))
    as_foreign(broken)
    other = AutoBridge.from_hf_config({**config, "rms_norm_eps": 1e-3})
    assert AutoBridge.from_auto_config(foreign, root / "kept").state.record is None
    return {
        "taken": refusal(lambda: AutoBridge.import_ckpt(root / "kept", root / "native")),
        "nothing there": refusal(lambda: bridge.export_ckpt(root / "kept", root / "x")),
        "no config": refusal(lambda: AutoBridge.from_auto_config(foreign)),
        "other config": refusal(lambda: other.export_ckpt(root / "native", root / "x")),
        "other source": refusal(lambda: other.save_hf_pretrained(model, root / "x", source_path=root / "kept")),
        "other hf_path": refusal(lambda: other.load_hf_weights(model, root / "kept")),
        "damaged assets": damaged,
        "damaged record": refusal(lambda: bridge.export_ckpt(broken, root / "x")),
        "twice": refusal(lambda: bridge.load_megatron_model(root / "native", tp=2, tensor_model_parallel_size=2)),
        "unknown": refusal(lambda: AutoBridge.import_ckpt(root / "kept", root / "x", tensor_parallel=2)),
    }


def not_strict(source: str, out: str) -> dict[str, Any]:
    """Imports a folder with a tensor too many and one too few; what an export says, here and after a native checkpoint."""
    from safetensors.torch import load_file, save_file

    root = Path(out)
    tensors = load_file(Path(source) / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.extra.weight"] = torch.zeros(3)
    save_file(tensors, Path(source) / "model.safetensors")
    bridge = AutoBridge.from_hf_pretrained(source)
    model = bridge.to_megatron_model(load_weights=False)
    strict = refusal(lambda: bridge.load_hf_weights(model))
    bridge.load_hf_weights(model, strict=False, show_progress=False)
    bridge.save_megatron_model(model, root / "native")
    again = AutoBridge.from_auto_config(root / "native")
    said = {
        "import": strict,
        "export": refusal(lambda: bridge.save_hf_pretrained(model, root / "x", False)),
        "export_ckpt": refusal(lambda: again.export_ckpt(root / "native", root / "x", False)),
        "published": (root / "x").exists(),
    }
    again.export_ckpt(root / "native", root / "loose", False, strict=False)
    bridge.load_hf_weights(model, allow_missing=["model.norm.*"], allow_unexpected=["*.extra.*"], show_progress=False)
    bridge.save_hf_weights(model, root / "allowed", False)
    said["folders"] = sorted(path.name for path in root.iterdir())
    return said


def in_ranks(source: str, out: str) -> list[str]:
    """A native checkpoint written by one layout and exported by another, without groups set up before."""
    AutoBridge.import_ckpt(source, Path(out) / "native", tp=2, show_progress=False)
    assert process_groups.current() is None
    AutoBridge.from_auto_config(Path(out) / "native").export_ckpt(Path(out) / "native", Path(out) / "pp2", False, pp=2)
    try:
        AutoBridge.import_ckpt(source, Path(out) / "native", tp=2)
    except MegabridgeError as error:
        return [str(error)]
    return []


def in_running_groups(source: str, out: str) -> None:
    """Sizes that are not given are those of the groups that run; they stay."""
    running = process_groups.current()
    bridge = AutoBridge.from_hf_pretrained(source)
    model = bridge.to_megatron_model()
    bridge.save_megatron_model(model, Path(out) / "native")
    AutoBridge.from_auto_config(Path(out) / "native").export_ckpt(Path(out) / "native", Path(out) / "hf", False)
    again = bridge.load_megatron_model(Path(out) / "native")
    bridge.save_hf_pretrained(again, Path(out) / "again", False, weight_dtype="source")
    assert process_groups.current() is running
    assert len(provide(bridge)) == len(again)


def imported(source: str, path: str) -> None:
    AutoBridge.import_ckpt(source, path, show_progress=False)


def uploaded(source: str, endpoint: str, cache: str) -> dict[str, Any]:
    """push_to_hub with a model, from a folder, without the right to; then the repository as a bridge's source."""
    import huggingface_hub
    from huggingface_hub import constants

    constants.ENDPOINT = endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = cache
    huggingface_hub.close_session()
    bridge = AutoBridge.from_hf_pretrained(source)
    model = bridge.to_megatron_model()
    answers: dict[str, Any] = {"no model": refusal(lambda: bridge.push_to_hub("me/model"))}
    answers["refused"] = refusal(lambda: bridge.push_to_hub("me/model", model, token="reader", show_progress=False))
    answers["url"] = bridge.push_to_hub("me/model", model, token="writer", show_progress=False, weight_dtype="source")
    answers["folder url"] = bridge.push_to_hub("me/folder", folder=source, token="writer")
    answers["no folder"] = refusal(lambda: bridge.push_to_hub("me/folder", folder=cache, token="writer"))
    answers["handles"] = AutoBridge.can_handle("me/folder")
    answers["code"] = [
        sorted(path.name for path in AutoBridge.from_hf_pretrained("me/code", trust_remote_code=trust).source.folder.glob("*.py"))  # type: ignore[union-attr]
        for trust in (False, True)
    ]
    bridge = AutoBridge.from_hf_pretrained("me/model", revision="main")
    answers["revision"] = bridge.source.revision
    answers["imported"] = bridge.load_hf_weights(model, show_progress=False).mismatched
    answers["gated"] = refusal(lambda: bridge.load_hf_weights(model, "org/gated"))
    answers["config"] = (
        json.loads((Path(source) / "config.json").read_text()) == AutoBridge.from_hf_pretrained("me/model").source.config
    )
    return answers
