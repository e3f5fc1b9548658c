"""What processes do whose model's folder goes, or becomes another's, after it was opened."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, override

import torch
import torch.distributed as dist

from megabridge import AutoBridge
from megabridge.callbacks import Callback
from megabridge.parallel import collectives, process_groups
from megabridge.peft import LoRA
from tests.support.bridge import refusal
from tests.support.convert import provide


def _replaced(folder: Path) -> None:
    """Another model's files under the same names, written over these."""
    for file in folder.iterdir():
        if file.name == "config.json":
            file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 0.25}))
        elif file.is_file():
            file.write_bytes(b"another's")
    (folder / "special_tokens_map.json").write_text("{}")


def _file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


LOSSES: Mapping[str, Callable[[Path], None]] = {
    "deleted": shutil.rmtree,
    "moved": lambda folder: folder.rename(folder.with_name("elsewhere")) and None,
    "emptied": lambda folder: [file.unlink() for file in folder.iterdir()] and None,
    "replaced": _replaced,
    "a file": _file,
}


def exports(source: str, out: str) -> dict[str, dict[str, str]]:
    """Every way out of a bridge after each loss of its folder, which rank 0 causes; what imports say then."""
    said: dict[str, dict[str, str]] = {}
    for name, lose in LOSSES.items():
        folder, target = Path(out) / name / "model", Path(out) / name
        if collectives.rank() == 0:
            shutil.copytree(source, folder)
        dist.barrier()
        bridge, adapted = (AutoBridge.from_hf_pretrained(folder) for _ in range(2))
        model = provide(bridge)
        with_adapters = adapted.to_megatron_model(peft=LoRA(r=2))
        dist.barrier()
        if collectives.rank() == 0:
            lose(folder)
        dist.barrier()
        bridge.save_hf_pretrained(model, target / "hf", False)
        bridge.save_megatron_model(model, target / "native")
        again = AutoBridge.from_auto_config(target / "native")
        again.save_hf_pretrained(again.load_megatron_model(target / "native"), target / "again", False, weight_dtype="source")
        adapted.save_hf_pretrained(with_adapters, target / "merged", False)
        adapted.save_hf_adapter(with_adapters, target / "adapter", False)
        adapted.save_megatron_model(with_adapters, target / "native_adapter")
        said[name] = {"import": refusal(partial(bridge.load_hf_weights, model, show_progress=False))}
    return said


def pushed(source: str, endpoint: str, cache: str) -> str:
    """push_to_hub of a model whose folder has gone."""
    import huggingface_hub
    from huggingface_hub import constants

    constants.ENDPOINT = endpoint
    constants.HF_HUB_CACHE = cache
    huggingface_hub.close_session()
    bridge = AutoBridge.from_hf_pretrained(source)
    model = bridge.to_megatron_model()
    shutil.rmtree(source)
    return bridge.push_to_hub("me/model", model, token="writer", show_progress=False)


def other_rank(source: str, out: str) -> dict[str, Any]:
    """A process that its launcher gave another place than the first keeps no tokenizer, and writes all the same if it must."""
    os.environ["RANK"] = "3"
    bridge = AutoBridge.from_hf_pretrained(source)
    del os.environ["RANK"]
    assert bridge.source.opened is not None
    first = AutoBridge.from_hf_pretrained(source)
    kept = first.source.opened is not None and first.source.opened.files is not None and sorted(first.source.opened.files)
    Path(out, "there").mkdir(parents=True)
    bridge.write_hf_assets(Path(out, "there"))
    seen = {
        "holds": bridge.source.opened.files,
        "first holds": kept,
        "written": sorted(path.name for path in Path(out, "there").iterdir()),
    }
    _replaced(Path(source))
    return seen | {"replaced": refusal(lambda: bridge.write_hf_assets(Path(out, "there")))}


class Loses(Callback):
    """Deletes the model's folder when the first step begins."""

    @override
    def before_step(self, trainer: Any) -> None:
        if trainer.is_main and trainer.step == 0:
            shutil.rmtree(trainer.config.model.path)


def passthrough(source: str, out: str) -> dict[str, str]:
    """Exports of a model with tensors that no parameter holds, whose files are gone; and whose files were written over."""
    said = {}
    for name, lose in (("deleted", shutil.rmtree), ("replaced", _replaced)):
        folder, target = Path(out) / name / "model", Path(out) / name
        if collectives.rank() == 0:
            shutil.copytree(source, folder)
        dist.barrier()
        bridge = AutoBridge.from_hf_pretrained(folder)
        model = provide(bridge)
        dist.barrier()
        if collectives.rank() == 0:
            lose(folder)
        dist.barrier()
        said[name] = refusal(partial(bridge.save_hf_pretrained, model, target / "hf", False, weight_dtype="source"))
        said[f"{name}, native"] = refusal(partial(bridge.save_megatron_model, model, target / "native"))
        assert process_groups.current() is not None and all(torch.isfinite(p).all() for chunk in model for p in chunk.parameters())
    damaged = Path(out) / "deleted" / "native"
    again = AutoBridge.from_auto_config(damaged)
    model = again.load_megatron_model(damaged)
    dist.barrier()
    if collectives.rank() == 0:
        (file,) = (damaged / "assets/passthrough").glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        stamp = file.stat()
        file.write_bytes(content)
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    dist.barrier()
    said["a flipped bit"] = refusal(lambda: again.save_hf_pretrained(model, Path(out) / "x", False, weight_dtype="source"))
    return said
