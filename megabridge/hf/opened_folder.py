"""A model's folder as it was when it was opened: its config, tokenizer and templates, whatever becomes of the folder later.

What exports carry is in the memory of the process that writes them; the others have the config alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from megabridge.errors import CheckpointError
from megabridge.hf import assets
from megabridge.parallel import collectives


@dataclass(frozen=True)
class OpenedFolder:
    """`config` is the content of config.json; `files` are the others by path, None in a process that isn't to write exports."""

    folder: Path
    config: bytes
    files: Mapping[str, bytes] | None
    code: bool

    @classmethod
    def of(cls, folder: Path, *, code: bool) -> Self:
        """Reads the folder; with `code` also its *.py files. Any rank may call it. Raises CheckpointError."""
        config = assets.read_file(folder / assets.CONFIG, otherwise="name a folder with a Hugging Face model")
        return cls(folder, config, assets.read_assets(folder, code=code) if _may_write() else None, code)

    def parsed(self) -> dict[str, Any]:
        """The content of config.json. Raises CheckpointError."""
        return assets.parse_object(self.config, str(self.folder / assets.CONFIG))

    def check(self, folder: Path) -> None:
        """Raises CheckpointError where `folder` holds another model's config than was opened."""
        now = assets.read_file(folder / assets.CONFIG, otherwise="put back what was there when the bridge was made")
        if now != self.config:
            raise CheckpointError(
                f"{folder} must hold the model that was there when the bridge was made, but its {assets.CONFIG} is another; make a "
                "new bridge, or put the model back."
            )

    def write(self, target: Path) -> None:
        """Writes all but the config into `target`. One rank calls it. Raises CheckpointError.

        A process that took another rank's place reads the folder once more.
        """
        files = self.files
        if files is None:
            self.check(self.folder)
            files = assets.read_assets(self.folder, code=self.code)
        assets.write_assets(target, files)


def _may_write() -> bool:
    """Whether this process may be the one that writes; before process groups start, by the place that its launcher gave it."""
    if dist.is_initialized():
        return collectives.rank() == 0
    return os.environ.get("RANK", "0") == "0"
