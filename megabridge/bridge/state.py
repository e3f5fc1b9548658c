"""What a bridge remembers between calls: the weights that it moved, and the plan of the model that it saw last."""

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
    """`AutoBridge.state`. `record` tells of the weights that were imported, here or before the native checkpoint that was loaded.

    `passthrough` are those that no parameter took and an export has again. `peft` says which adapters the model was given, if any.
    `import_report` and `import_digest` tell of the last import. `read_from` are folders that weights or adapters were read from.
    `plan` holds no parameter: a model can go while this lives.
    """

    record: SourceRecord | None = None
    passthrough: Passthrough = field(default_factory=Passthrough)
    peft: LoRA | None = None
    import_report: Report | None = None
    import_digest: str = ""
    read_from: tuple[Path, ...] = ()
    plan: tuple[tuple[ParameterRecord, ...], Plan] | None = None
    told: str = ""

    def carry(self, tensors: Passthrough) -> None:
        """Takes tensors that every export has again; closes the files of those before."""
        if tensors is not self.passthrough:
            self.passthrough.close()
        self.passthrough = tensors

    def note_source(self, folder: Path) -> None:
        """Has exports keep away from a folder that weights or adapters were read from."""
        self.read_from = (*dict.fromkeys((*self.read_from, folder.absolute())),)

    def tell(self, what: str, casts: Casts) -> None:
        """Prints what was rounded, once."""
        line = f"{what}: {described(casts)}"
        if casts and line != self.told and collectives.rank() == 0:
            print(line, file=sys.stderr, flush=True)
        self.told = line if casts else self.told

    def remember(self, folder: Path) -> None:
        """Takes from a native checkpoint what was written of its source, if anything. Raises CheckpointError."""
        if (own := checkpoint.assets(folder)) is not None:
            self.record = SourceRecord.read(own) or self.record
            self.carry(passthrough.read(own) or self.passthrough)


def plan_of(source: ModelSource, state: BridgeState, parameters: Sequence[LocalParameter]) -> Plan:
    """The conversion plan of a model with these parameters, made once for what the parameters' records say. Collective."""
    records = tuple(parameter.record for parameter in parameters)
    known = state.plan is not None and state.plan[0] == records
    if not all(collectives.all_gather(known)):
        state.plan = (records, make_plan(source.family, source.native, parameters).unbound())
    assert state.plan is not None
    return state.plan[1].bound(parameters)


def read_folders(source: ModelSource, state: BridgeState) -> list[Path]:
    """The folders that anything of the model was read from: no export takes the place of one."""
    return [*([] if source.folder is None else [source.folder.absolute()]), *state.read_from]
