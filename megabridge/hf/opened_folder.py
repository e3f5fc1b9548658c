"""OpenedFolder: a snapshot of a model's config, tokenizer and templates, unaffected by later changes of the folder.

The process that writes exports keeps all files in memory; the others keep only the config.
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
    """`config` is the content of config.json; `files` are the others by path, None in a process that doesn't write exports."""

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
        """Parses config.json. Raises CheckpointError."""
        return assets.parse_object(self.config, str(self.folder / assets.CONFIG))

    def check(self, folder: Path) -> None:
        """Raises CheckpointError if `folder` has another config.json than the one that was opened."""
        now = assets.read_file(folder / assets.CONFIG, otherwise="put back what was there when the bridge was made")
        if now != self.config:
            raise CheckpointError(
                f"{folder} must hold the model that was there when the bridge was made, but its {assets.CONFIG} is another; make a "
                "new bridge, or put the model back."
            )

    def write(self, target: Path) -> None:
        """Writes all files but the config to `target`. One rank calls it. Raises CheckpointError.

        A process without `files` reads the folder again.
        """
        files = self.files
        if files is None:
            self.check(self.folder)
            files = assets.read_assets(self.folder, code=self.code)
        assets.write_assets(target, files)


def _may_write() -> bool:
    """Whether this process writes exports (rank 0); before process groups start, from the environment variable RANK."""
    if dist.is_initialized():
        return collectives.rank() == 0
    return os.environ.get("RANK", "0") == "0"
