"""What ranks do in the conversion tests."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from megabridge import AutoBridge
from megabridge.errors import MegabridgeError
from megabridge.models.logits import gather_logits
from megabridge.parallel import process_groups
from tests.support.models import llama_config, prompt, reference_logits, write_model


def provide(bridge: AutoBridge, *, load_weights: bool = True, **settings: Any) -> list[torch.nn.Module]:
    """The model under the groups that run now, with sequence parallelism where megatron-core asks for it."""
    topology = process_groups.current()
    assert topology is not None
    if topology.tp > 1 and "num_moe_experts" in bridge.source.native:
        settings.setdefault("sequence_parallel", True)
    sizes = {
        "tensor_model_parallel_size": topology.tp,
        "pipeline_model_parallel_size": topology.pp,
        "virtual_pipeline_model_parallel_size": topology.vpp if topology.vpp > 1 else None,
        "expert_model_parallel_size": topology.ep,
        "expert_tensor_parallel_size": topology.etp,
    }
    return bridge.to_megatron_model(load_weights, **sizes, **settings)


def make_models(root: str, seeds: list[int]) -> None:
    """Source folders and reference logits, one per seed; a sharded one, one with a redundant lm_head among them."""
    for number, seed in enumerate(seeds):
        folder = write_model(Path(root) / str(number), llama_config(seed), seed)
        tokens = prompt(llama_config(seed)["vocab_size"])
        torch.save(reference_logits(folder, tokens), Path(root) / f"{number}.logits")


def round_trips(root: str, out: str, seeds: list[int]) -> list[dict[str, Any]]:
    """Imports, runs and exports every model; returns what was seen of each."""
    seen = []
    for number in range(len(seeds)):
        source, target = Path(root) / str(number), Path(out) / str(number)
        bridge = AutoBridge.from_hf_pretrained(source)
        model = provide(bridge, sequence_parallel=number % 2 == 1 and bridge_tp() > 1)
        report = bridge.import_report
        assert report is not None
        logits = gather_logits(model, prompt(bridge.source.config["vocab_size"]))
        expected = torch.load(Path(root) / f"{number}.logits")
        owned = bridge.plan(model).owned_bytes
        export = bridge.save_hf_pretrained(model, target, show_progress=False, max_shard_size="40KB" if number % 3 == 0 else "5GB")
        seen.append(
            {
                "logits": (logits - expected).abs().max().item(),
                "scale": expected.abs().max().item(),
                "copied": report.bytes_copied,
                "owned": owned,
                "mismatched": report.mismatched + export.mismatched,
            }
        )
    return seen


def bridge_tp() -> int:
    topology = process_groups.current()
    assert topology is not None
    return topology.tp


def negated_export(source: str, out: str) -> None:
    """Every parameter negated in the model, the source deleted before the export."""
    own = Path(source)
    bridge = AutoBridge.from_hf_pretrained(own)
    model = provide(bridge)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        for file in own.glob("*.safetensors*"):
            file.unlink()
    torch.distributed.barrier()
    with torch.no_grad():
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.neg_()
    bridge.save_hf_pretrained(model, out, show_progress=False)


def refusals(folders: list[str]) -> list[tuple[str, str, float]]:
    """(error type, message, seconds) of importing each folder."""
    out = []
    for folder in folders:
        begin = time.monotonic()
        try:
            provide(AutoBridge.from_hf_pretrained(folder))
            out.append(("", "", time.monotonic() - begin))
        except MegabridgeError as error:
            out.append((type(error).__name__, str(error), time.monotonic() - begin))
    return out


def failing_export(source: str, out: str, rank: int) -> tuple[str, str, bool]:
    """One rank can't write: what every rank raises, and whether anything was published."""
    from megabridge.conversion.file_writer import Writer

    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    if torch.distributed.get_rank() == rank:

        def full(self: Writer) -> None:
            raise OSError(28, "No space left on device")

        Writer.sync = full  # type: ignore[method-assign]
    try:
        bridge.save_hf_pretrained(model, out, show_progress=False)
    except MegabridgeError as error:
        torch.distributed.barrier()
        return type(error).__name__, str(error), any(Path(out).parent.glob("*out*"))
    return "", "", True


def dtypes(source: str, out: str) -> dict[str, Any]:
    """Imports fp32 into bf16 and back under both policies; and a model whose tensors have mixed dtypes."""
    bridge = AutoBridge.from_hf_pretrained(source, dtype="bfloat16")
    model = provide(bridge)
    report = bridge.import_report
    bridge.save_hf_pretrained(model, Path(out) / "bf16", show_progress=False)
    bridge.save_hf_pretrained(model, Path(out) / "fp32", show_progress=False, weight_dtype="float32")
    return {"params": {str(p.dtype) for chunk in model for p in chunk.parameters()}, "mismatched": report and report.mismatched}


def replaced(source: str, out: str) -> None:
    """Exports over an export that is there."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    for _ in range(2):
        bridge.save_hf_pretrained(model, out, show_progress=False)
    shutil.rmtree(Path(out).with_name(f".{Path(out).name}.partial"), ignore_errors=True)
