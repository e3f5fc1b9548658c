"""Builds the objects that a recipe needs from the typed config, one function for each."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from math import ceil, lcm
from pathlib import Path
from typing import Any, Final, Literal

import torch

import megabridge.platform as platform
from megabridge.bridge import sessions
from megabridge.bridge.auto_bridge import AutoBridge
from megabridge.config import instantiate, layout_rules
from megabridge.config.schema import Config, PeftConfig
from megabridge.data import DataModule, RowRules
from megabridge.errors import CheckpointError, ConfigError
from megabridge.hf import assets, byte_tokenizer, resolve
from megabridge.loggers import Logger
from megabridge.models.provider import ModelProvider
from megabridge.parallel import process_groups
from megabridge.parallel.collectives import on_rank_zero, raise_together, rank
from megabridge.parallel.topology import SETTINGS, Topology
from megabridge.peft import LoRA
from megabridge.storage import start_lines
from megabridge.training import freezing
from megabridge.training.hooks import Callback

BYTES: Final = "bytes"
"""Value of model.tokenizer for the byte-level tokenizer, which needs no file."""
_ON_CUDA: Final = 32
"""What lengths of rows are multiples of on CUDA: few shapes for its allocator, and whole tiles of 16- and 8-bit matrices."""


def bridge(config: Config) -> AutoBridge:
    """Builds the bridge to model.path, or to a folder written from model.hf and model.tokenizer. Every rank calls it."""
    model = config.model
    location = model.path
    if location is None:
        # A source like any other from here on: every export has its config and tokenizer.
        location = str(on_rank_zero("writing the model's config", lambda: _write_source(config)))
    return AutoBridge.from_hf_pretrained(
        location,
        revision=model.revision,
        dtype=model.dtype,
        trust_remote_code=model.trust_remote_code,
        ignore_keys=model.ignore_keys,
    )


def model_config(config: Config) -> dict[str, Any]:
    """Returns the content of the model's config.json: model.path's, or model.hf. Every rank calls it."""
    model = config.model
    if model.path is None:
        return dict(model.hf)
    return assets.read_config(resolve.resolve(model.path, revision=model.revision, config_only=True))


def provider(config: Config, bridge: AutoBridge, *, keeps_dtypes: bool = False) -> ModelProvider:
    """Builds the finalized provider of the bridge's model in this config's layout; its chunks import the weights, if any.

    With `keeps_dtypes`, for a model that is converted and not run, parameters have the dtypes of the files.
    """
    parallel = config.parallel
    made = bridge.to_megatron_provider(load_weights=False)
    sessions.arrange(made, {name: getattr(parallel, name) for name in SETTINGS})
    made.sequence_parallel = parallel.sequence_parallel
    if parallel.layout is not None:
        made.pipeline_model_parallel_layout = parallel.layout
    made.params_dtype = config.model.dtype
    made.backend = config.backend.name
    made.adapted = config.peft.name != "none"
    made.deterministic_mode = config.deterministic
    made.calculate_per_token_loss = True
    for name, value in config.model.provider.items():
        setattr(made, name, value)
    made.finalize()
    if config.model.load_weights:
        if keeps_dtypes:
            made.register_pre_wrap_hook(partial(bridge.keep_dtypes, allow_bin=config.conversion.allow_bin))
        made.register_pre_wrap_hook(partial(_import, config, bridge))
    if config.optimizer.freeze:
        made.register_pre_wrap_hook(partial(freezing.freeze, bridge=bridge, patterns=config.optimizer.freeze))
    if config.peft.name != "none":
        made.register_pre_wrap_hook(partial(_adapt, config, bridge))
    return made


def init(config: Config) -> Literal["random", "empty"]:
    """Initialisation of parameters: empty where an import fills all of them, random otherwise."""
    may_lack = bool(config.conversion.allow_missing) or not config.conversion.strict
    return "empty" if config.model.load_weights and not may_lack else "random"


def _import(config: Config, bridge: AutoBridge, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    conversion = config.conversion
    bridge.load_hf_weights(
        chunks,
        verify=conversion.verify,
        strict=conversion.strict,
        allow_missing=conversion.allow_missing,
        allow_unexpected=conversion.allow_unexpected,
        allow_bin=conversion.allow_bin,
        allow_nonfinite=conversion.allow_nonfinite,
        reader=conversion.reader,  # type: ignore[arg-type]  # one of its choices
        dedupe=conversion.dedupe,
        digest=config.peft.name != "none",  # adapters resume only on the weights that they were started on
    )
    if rank() == 0:
        start_lines.say("weights read")
    return chunks


def lora(peft: PeftConfig) -> LoRA:
    """Builds the settings of adapters from the group `peft`. Raises ConfigError."""
    return LoRA(
        target_modules=tuple(peft.target_modules),
        exclude_modules=tuple(peft.exclude_modules),
        target_parameters=tuple(peft.target_parameters),
        r=peft.r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=peft.lora_dropout,
        use_rslora=peft.use_rslora,
        use_dora=peft.name == "dora",
    )


def _adapt(config: Config, bridge: AutoBridge, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    chunks = bridge.add_adapters(chunks, lora(config.peft), seed=config.seed)
    if config.peft.path is not None:
        bridge.load_hf_adapter(chunks, config.peft.path, verify=config.conversion.verify)
    return chunks


def data(config: Config, bridge: AutoBridge) -> DataModule:
    """Builds the data module of the group `data`, set up with the bridge's tokenizer. Every rank calls it."""
    with raise_together("preparing the data"):
        made = instantiate.build(config.data, DataModule, where="data")
        made.vocab_size = int(bridge.source.native["vocab_size"])
        made.row_rules = row_rules(config, has_experts=bridge.source.native.get("num_moe_experts") is not None)
        assert bridge.source.folder is not None  # `bridge` above opens one
        made.setup(
            bridge.source.folder,
            seq_length=config.recipe.seq_length,
            micro_batch_size=config.recipe.micro_batch_size,
            global_batch_size=config.recipe.global_batch_size,
            seed=config.seed,
        )
    return made


def settle_steps(config: Config, data: DataModule) -> str:
    """Sets recipe.steps from recipe.epochs and the rows of `data`, and returns a line that says so; nothing where it is set itself.

    Raises ConfigError for data without an end.
    """
    recipe = config.recipe
    if recipe.epochs is None:
        return ""
    if not (rows := data.epoch_rows()):
        raise ConfigError(
            f"recipe.epochs={recipe.epochs:g} needs data whose rows are counted, and {type(data).__name__} has no end that is "
            "known; set recipe.steps, and recipe.epochs=null."
        )
    recipe.steps = max(1, ceil(recipe.epochs * rows / recipe.global_batch_size))
    return f"recipe.epochs={recipe.epochs:g} of {rows} rows: recipe.steps={recipe.steps}, each of {recipe.global_batch_size} rows"


def row_rules(config: Config, *, has_experts: bool) -> RowRules:
    """What rows shorter than recipe.seq_length must keep to in the running layout.

    The stages of a pipeline send each other micro-batches of one shape: telling it would cost a message and a wait for the device
    each time. Routers' losses are means over micro-batches, which must count alike.
    """
    topology = process_groups.current() or Topology()
    multiple = layout_rules.sequence_multiple(topology, sequence_parallel=config.parallel.sequence_parallel)
    backend = layout_rules.backend_of_run(config)
    unpackable = f"parallel.cp={topology.cp}" if topology.cp > 1 else ""
    if backend not in (None, "torch", "te"):
        unpackable = f"backend={backend}"
    return RowRules(
        multiple if platform.is_cpu() else lcm(multiple, _ON_CUDA),
        is_common=topology.pp > 1 or has_experts,
        unpackable=unpackable,
    )


def callbacks(config: Config) -> list[Callback]:
    """Builds the callbacks of the group `callbacks`, in their order, without those set to null."""
    nodes = {name: node for name, node in config.callbacks.items() if node is not None}
    return [instantiate.build(node, Callback, where=f"callbacks.{name}") for name, node in nodes.items()]


def loggers(config: Config) -> list[Logger]:
    """Builds the loggers of the group `logger`, without those set to null."""
    nodes = {name: node for name, node in config.logger.items() if node is not None}
    return [instantiate.build(node, Logger, where=f"logger.{name}") for name, node in nodes.items()]


def _write_source(config: Config) -> Path:
    """Writes the source folder, each file atomically: on a full disk the files of an earlier run remain. Raises CheckpointError."""
    folder = Path(config.run_dir) / "source"
    files = {}
    if config.model.tokenizer not in (BYTES, None):
        files = assets.read_assets(resolve.resolve(str(config.model.tokenizer), config_only=True))
    if folder.is_symlink():
        raise CheckpointError(f"{folder} must be a folder of this run's own, not a link; remove it, or set another run_dir.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as made:
            content = json.dumps(config.model.hf, indent=2, ensure_ascii=False)
            Path(made, assets.CONFIG).write_text(content + "\n", encoding="utf-8")
            if config.model.tokenizer == BYTES:
                byte_tokenizer.write_tokenizer(Path(made))
            assets.write_assets(Path(made), files)
            for file in (file for file in Path(made).rglob("*") if file.is_file()):
                target = folder / file.relative_to(made)
                target.parent.mkdir(exist_ok=True)
                file.replace(target)
    except OSError as error:
        raise CheckpointError(f"{folder} can't be written ({error.strerror}); free space, or set another run_dir.") from error
    return folder
