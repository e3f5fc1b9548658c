"""Exports a Hugging Face folder at every save, verified bit by bit and against transformers' logits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, override

from megabridge.callbacks.parity import LOGITS_TOKENS, compare_logits
from megabridge.errors import ConfigError
from megabridge.parallel.collectives import on_rank_zero
from megabridge.storage import regular_files
from megabridge.training.hooks import Callback

if TYPE_CHECKING:
    from megabridge.training.loop import Trainer

FOLDER: Final = "hf"
ADAPTER_FOLDER: Final = "adapter"


class HFExport(Callback):
    """Writes checkpoints/step_N/hf on every save, unless checkpoint.hf is false; for unmerged adapters step_N/adapter, for PEFT.

    A resumed run writes the folder of the step that it continues from, if it is missing.

    Logs the export's report as `export/*` and the comparison of logits as `parity/*`. Uses the settings of the group `conversion`:
    export_dtype, export_quantization, max_shard_size, writer, verify, strict, allow_nonfinite. Logits are compared on
    `logits_tokens` tokens; 0: not compared.
    """

    def __init__(self, logits_tokens: int = LOGITS_TOKENS) -> None:
        self.logits_tokens = logits_tokens

    @override
    def on_start(self, trainer: Trainer) -> None:
        if trainer.config.checkpoint.hf and trainer.bridge is None:
            raise ConfigError("checkpoint.hf=true needs a bridge to export with; give Trainer(bridge=...) or set it to false.")

    @override
    def on_resume(self, trainer: Trainer, folder: Path) -> None:
        """Exports the step that the run continues from, if the previous process ended before it did."""
        step, peft = folder.parent, trainer.config.peft
        name = ADAPTER_FOLDER if peft.name != "none" and not peft.merge else FOLDER
        is_ours = step.parent.resolve() == trainer.checkpoints.resolve()
        if is_ours and not on_rank_zero("looking for an export", lambda: regular_files.is_folder(step / name)):
            self.on_save(trainer, trainer.step, step)

    @override
    def save_bytes(self, trainer: Trainer) -> int:
        if not trainer.config.checkpoint.hf or trainer.bridge is None:
            return 0
        peft, asked = trainer.config.peft, trainer.config.conversion.export_dtype
        if peft.name != "none" and not peft.merge:
            return trainer.bridge.export_size(trainer.chunks, weight_dtype=asked, adapters_only=True)
        return trainer.bridge.export_size(trainer.chunks, weight_dtype=trainer.bridge.export_dtype(asked))

    @override
    def on_save(self, trainer: Trainer, step: int, folder: Path) -> None:
        if not trainer.config.checkpoint.hf or trainer.bridge is None:
            return
        conversion = trainer.config.conversion
        rules: dict[str, Any] = {
            "writer": conversion.writer,
            "verify": conversion.verify,
            "allow_nonfinite": conversion.allow_nonfinite,
        }
        peft = trainer.config.peft
        if peft.name != "none" and not peft.merge:
            report = trainer.bridge.save_hf_adapter(
                trainer.chunks, folder / ADAPTER_FOLDER, weight_dtype=conversion.export_dtype, **rules
            )
            line = f"adapters of step {step} in {folder / ADAPTER_FOLDER}: {report}"
        else:
            target, dtype = folder / FOLDER, trainer.bridge.export_dtype(conversion.export_dtype)
            report = trainer.bridge.save_hf_pretrained(
                trainer.chunks,
                target,
                weight_dtype=dtype,
                quantization=conversion.export_quantization,
                max_shard_size=conversion.max_shard_size,
                strict=conversion.strict,
                **rules,
            )
            trainer.exports.append(target)
            with trainer.bridge.as_exported(trainer.chunks, weight_dtype=dtype):
                parity = compare_logits(trainer, target, self.logits_tokens, prefix="parity")
            line = f"export of step {step}: {report}{parity}"
        trainer.log({f"export/{name}": value for name, value in report.metrics().items()})
        trainer.say(line)
