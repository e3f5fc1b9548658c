"""Digests of a run's inputs, compared on resume: the weights under adapters, the model config, the tokenizer, the data's rows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import xxhash

from megabridge.config.schema import Config
from megabridge.hf import assets
from megabridge.parallel import process_groups
from megabridge.parallel.collectives import on_rank_zero

if TYPE_CHECKING:
    from megabridge.bridge.auto_bridge import AutoBridge
    from megabridge.data import DataModule

PREFIX: Final = "inputs."
WEIGHTS, MODEL, TOKENIZER, ROWS = (PREFIX + name for name in ("weights", "config", "tokenizer", "rows"))


def found(config: Config, bridge: AutoBridge | None, data: DataModule) -> dict[str, Any]:
    """Returns the digests by name, without inputs that the run doesn't have. Collective.

    A native checkpoint of full training has all weights; only adapters depend on the weights that they were started on. Random ones
    follow from the seed and the layout.
    """
    out: dict[str, Any] = {}
    if config.peft.name != "none":
        if bridge is not None and bridge.import_digest:
            out[WEIGHTS] = bridge.import_digest
        elif not config.model.load_weights:
            sizes = {name: size for name, size in process_groups.running().sizes().items() if name not in ("dp", "cp")}
            out[WEIGHTS] = f"random, of seed {config.seed} under {sizes}"
    if bridge is not None and config.model.path is not None:
        out |= {f"{MODEL}.{name}": json.loads(json.dumps(value, default=str)) for name, value in bridge.source.native.items()}
    if (digest := on_rank_zero("reading the tokenizer", lambda: _tokenizer(bridge))) is not None:
        out[TOKENIZER] = digest
    if digest := data.digest():
        out[ROWS] = digest
    return out


def _tokenizer(bridge: AutoBridge | None) -> str | None:
    """Digest of the tokenizer's files and templates; None where there are none. For rank 0, which keeps them."""
    files = {} if bridge is None or bridge.source.opened is None else bridge.source.opened.files or {}
    own = {name: content for name, content in files.items() if name != assets.GENERATION and not name.endswith(".py")}
    digest = xxhash.xxh3_128()
    for name, content in sorted(own.items()):
        digest.update(f"{name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest() if own else None
