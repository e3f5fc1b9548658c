"""The state of a bridge between calls: a record of the imported weights, and the plan of the last model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megabridge.bridge.source import ModelSource
from megabridge.conversion import passthrough
from megabridge.conversion.parameters import LocalParameter, ParameterRecord
from megabridge.conversion.passthrough import Passthrough
from megabridge.conversion.plan import Plan, make_plan
from megabridge.conversion.report import Report
from megabridge.hf.dtypes import Casts, described
from megabridge.native import checkpoint
from megabridge.native.source_record import SourceRecord
from megabridge.parallel import collectives
from megabridge.peft import LoRA


@dataclass
class BridgeState:
    """The mutable part of a bridge, `AutoBridge.state`.

    `record` describes the imported weights: those that this bridge imported, or those that a loaded native checkpoint was made
    from. `passthrough` holds tensors that no parameter took and that exports write again. `peft` has the settings of the model's
    adapters, if any. `import_report` and `import_digest` are those of the last import. `read_from` lists the folders that weights
    or adapters were read from. `plan` references no parameter, so it doesn't keep a model alive.
    """

    record: SourceRecord | None = None
    passthrough: Passthrough = field(default_factory=Passthrough)
    peft: LoRA | None = None
    import_report: Report | None = None
    import_digest: str = ""
    read_from: tuple[Path, ...] = ()
    plan: tuple[tuple[ParameterRecord, ...], Plan] | None = None
    printed: str = ""

    def set_passthrough(self, tensors: Passthrough) -> None:
        """Replaces the passthrough tensors, and closes the files of the previous ones."""
        if tensors is not self.passthrough:
            self.passthrough.close()
        self.passthrough = tensors

    def note_source(self, folder: Path) -> None:
        """Records a folder that weights or adapters were read from, which exports must not replace."""
        self.read_from = (*dict.fromkeys((*self.read_from, folder.absolute())),)

    def print_casts(self, what: str, casts: Casts) -> None:
        """Prints on rank 0 which tensors were rounded, unless the same line was the last one printed."""
        line = f"{what}: {described(casts)}"
        if casts and line != self.printed and collectives.rank() == 0:
            print(line, file=sys.stderr, flush=True)
        self.printed = line if casts else self.printed

    def remember(self, folder: Path) -> None:
        """Takes over a native checkpoint's record of its source and its passthrough tensors, if any. Raises CheckpointError."""
        if (own := checkpoint.assets(folder)) is not None:
            self.record = SourceRecord.read(own) or self.record
            self.set_passthrough(passthrough.read(own) or self.passthrough)


def plan_of(source: ModelSource, state: BridgeState, parameters: Sequence[LocalParameter]) -> Plan:
    """Returns the conversion plan of a model with these parameters; reuses the last plan if their records match. Collective."""
    records = tuple(parameter.record for parameter in parameters)
    known = state.plan is not None and state.plan[0] == records
    if not all(collectives.all_gather(known)):
        state.plan = (records, make_plan(source.family, source.native, parameters).unbound())
    assert state.plan is not None
    return state.plan[1].bound(parameters)


def read_folders(source: ModelSource, state: BridgeState) -> list[Path]:
    """Returns the folders that any part of the model was read from, which exports must not replace."""
    return [*([] if source.folder is None else [source.folder.absolute()]), *state.read_from]
