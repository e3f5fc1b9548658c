"""Converts without training: recipe=convert conversion.mode=import|export|roundtrip|verify.

import: converts a Hugging Face model to a native checkpoint. export: converts a native checkpoint (checkpoint.resume) to a Hugging
Face folder. roundtrip: imports and exports; the exported tensors equal the source's byte by byte. verify: checks an exported folder
(conversion.folder) against its manifest and, if set, against conversion.source.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from megabridge import AutoBridge
from megabridge.config.schema import Config
from megabridge.conversion import verify as verify_folder
from megabridge.conversion.report import Report
from megabridge.errors import CheckpointError, ConfigError, plain
from megabridge.hf import resolve
from megabridge.loggers import Reporter
from megabridge.native import checkpoint
from megabridge.parallel import collectives
from megabridge.training import build


def main(config: Config) -> None:
    """Every rank calls it, in running process groups."""
    conversion = config.conversion
    if conversion.mode == "verify":
        verify(config)
        return
    output = Path(conversion.output) if conversion.output else Path(config.run_dir)
    has_adapters = config.peft.name != "none"
    config.model.load_weights = conversion.mode != "export" or has_adapters  # a native checkpoint of adapters has no base weights
    bridge = build.bridge(config)
    provider = build.provider(config, bridge, keeps_dtypes=True)
    if conversion.mode == "export":
        provider.register_pre_wrap_hook(partial(bridge.keep_native_dtypes, path=native_folder(config)))
    chunks = provider.provide_distributed_model(
        wrap_with_ddp=False, init="empty" if conversion.mode == "export" else build.init(config), runs=False
    )
    with Reporter(config, build.loggers(config)) as report:
        report.say(provider.describe(runs=False))
        if conversion.mode == "export":
            bridge.load_native_weights(chunks, native_folder(config))
        else:
            assert bridge.import_report is not None
            report.log(0, {f"import/{name}": value for name, value in bridge.import_report.metrics().items()})
            report.say(f"import: {bridge.import_report}")
        if conversion.mode == "import":
            checkpoint.save(output / "native", chunks, progress=checkpoint.TrainingProgress(), write_assets=bridge.write_assets)
            report.say(f"native checkpoint: {output / 'native'}")
        else:
            target = output / ("adapter" if has_adapters and not config.peft.merge else "hf")
            exported = export(config, bridge, chunks, target)
            report.log(0, {f"export/{name}": value for name, value in exported.metrics().items()})
            report.say(f"export: {exported}")
            report.say(f"Hugging Face folder: {target}")


def export(config: Config, bridge: AutoBridge, chunks: list[torch.nn.Module], target: Path) -> Report:
    """Writes the whole model or, for adapters without peft.merge, their PEFT folder. Every rank calls it."""
    conversion = config.conversion
    rules: dict[str, Any] = {
        "weight_dtype": bridge.export_dtype(conversion.export_dtype),
        "writer": conversion.writer,
        "verify": conversion.verify,
        "allow_nonfinite": conversion.allow_nonfinite,
    }
    if config.peft.name != "none" and not config.peft.merge:
        return bridge.save_hf_adapter(chunks, target, **rules | {"weight_dtype": conversion.export_dtype})
    return bridge.save_hf_pretrained(
        chunks,
        target,
        strict=conversion.strict,
        quantization=conversion.export_quantization,
        max_shard_size=conversion.max_shard_size,
        **rules,
    )


def verify(config: Config) -> None:
    """Checks a folder without building a model. Every rank calls it.

    Prints all differences and raises CheckpointError if there are any.
    """
    conversion = config.conversion
    if conversion.folder is None:
        raise ConfigError("conversion.mode=verify needs the folder of an export; set conversion.folder=<folder>.")
    folder = Path(conversion.folder)
    checked = f"{folder} is what its manifest says"
    problems = verify_folder.against_manifest(folder)
    if conversion.source is not None:
        with collectives.raise_together("fetching the source"):
            origin = resolve.resolve(conversion.source)
        problems += verify_folder.against_source(folder, origin)
        checked += f", and its tensors are those of {conversion.source}"
    if problems:
        if collectives.rank() == 0:
            print(*map(plain, problems), sep="\n", flush=True)
        raise CheckpointError(f"{folder} differs in {len(problems)} places from what it should be; export it again.")
    with Reporter(config, build.loggers(config)) as report:
        report.say(checked)


def native_folder(config: Config) -> Path:
    """Returns the native folder to export, from checkpoint.resume. Raises ConfigError when that names none."""
    if config.checkpoint.resume in ("none", "auto"):
        raise ConfigError(
            f"conversion.mode=export needs a native checkpoint; set checkpoint.resume=<run>/checkpoints/step_N/native, "
            f"not {config.checkpoint.resume}."
        )
    return Path(config.checkpoint.resume)
