"""What ranks do in the tests of exported folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megabridge import AutoBridge
from megabridge.conversion import verify
from megabridge.conversion.export_plan import plan_export
from megabridge.conversion.exporter import export_weights
from megabridge.errors import MegabridgeError
from megabridge.peft import LoRA
from tests.support.bridge import refusal
from tests.support.convert import provide


def exports(source: str, outs: dict[str, dict[str, Any]]) -> list[dict[str, int]]:
    """Imports once and exports to each folder with its settings; what was written and what was kept."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    reports = [bridge.save_hf_pretrained(model, out, show_progress=False, **settings) for out, settings in outs.items()]
    return [{"written": report.bytes_copied, "kept": report.bytes_kept} for report in reports]


def onto(source: str, folders: list[str], writer: str = "shared") -> list[str]:
    """Exports a model with other weights to each folder, which holds something: the error of each, if any."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    with torch.no_grad():
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.mul_(2)
    return [refusal(lambda out=out: bridge.save_hf_pretrained(model, out, show_progress=False, writer=writer)) for out in folders]


def meddled(source: str, out: str) -> list[str]:
    """Exports to a folder in which something changes while the export is written: the error of each change."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    seen = []
    for name in ("config.json", "notes.txt", "README.md"):

        def write_assets(folder: Path, name: str = name) -> None:
            Path(out, name).write_text("mine")

        seen.append(refusal(lambda: export_weights(plan_export(bridge.plan(model), Path(out)), write_assets=write_assets)))
        if name != "README.md":
            Path(out, name).unlink()
    return seen


def sources(source: str, root: str) -> dict[str, str]:
    """Exports into folders that the model was read from, which are exports themselves: the error of each, if any."""
    place = Path(root)
    first = AutoBridge.from_hf_pretrained(source)
    model = first.to_megatron_model(peft=LoRA(r=2, target_modules=("q_proj",)))
    first.save_hf_pretrained(model, place / "in" / "own", show_progress=False)
    for name in ("weights", "assets"):
        first.save_hf_pretrained(model, place / name, show_progress=False)
    first.save_hf_adapter(model, place / "adapter", show_progress=False)
    first.save_megatron_model(model, place / "native")
    (place / "link").symlink_to(place / "in" / "own")
    bridge = AutoBridge.from_hf_pretrained(place / "link")
    model = bridge.to_megatron_model(hf_path=place / "weights")
    bridge.load_hf_adapter(model, place / "adapter", show_progress=False)

    def save(name: str, **how: Any) -> str:
        return refusal(lambda: bridge.save_hf_pretrained(model, place / name, show_progress=False, **how))

    seen = {name: save(name) for name in ("in/own", "in", "link", "weights")}
    seen["assets"] = save("assets", source_path=place / "assets")
    seen["adapter"] = refusal(lambda: bridge.save_hf_adapter(model, place / "adapter", show_progress=False))
    seen["weights only"] = refusal(lambda: bridge.save_hf_weights(model, place / "weights", show_progress=False))
    bridge.load_native_weights(model, place / "native")
    return seen | {"native": save("native"), "elsewhere": save("assets"), "inside": save("in/own/export")}


def checked(folders: list[str]) -> list[list[str]]:
    """What is wrong with each folder by its manifest, or the error that says so."""
    return [_problems(verify.against_manifest, folder) for folder in folders]


def checked_against(pairs: list[tuple[str, str]]) -> list[list[str]]:
    """How the tensors of each first folder differ from those of the second."""
    return [_problems(verify.against_source, *pair) for pair in pairs]


def _problems(check: Any, *folders: str) -> list[str]:
    try:
        found: list[str] = check(*map(Path, folders))
        return found
    except MegabridgeError as error:
        return [f"{type(error).__name__}: {error}"]
