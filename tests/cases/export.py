"""What ranks do in the tests of exported folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megabridge import AutoBridge
from megabridge.conversion import verify
from megabridge.errors import MegabridgeError
from tests.cases.convert import provide


def exports(source: str, outs: dict[str, dict[str, Any]]) -> list[dict[str, int]]:
    """Imports once and exports to each folder with its settings; what was written and what was kept."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    reports = [bridge.save_hf_pretrained(model, out, show_progress=False, **settings) for out, settings in outs.items()]
    return [{"written": report.bytes_copied, "kept": report.bytes_kept} for report in reports]


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
