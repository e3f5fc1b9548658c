"""Uploads a published folder to the Hugging Face hub."""

from __future__ import annotations

import stat
from pathlib import Path

from megabridge.conversion import manifest
from megabridge.errors import CheckpointError
from megabridge.hf import assets
from megabridge.hf.tensor_files import find_tensors
from megabridge.storage.inside_folder import entries, inside


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Uploads all of `folder` to the model repository `repo_id`, which is created if missing. Returns the commit's URL.

    It is a single commit, so nobody can download half of the model. Git's own files and the notes of a download are left out. One
    rank calls it. Raises CheckpointError for a folder that isn't a complete model or has links that lead out of it, and when the
    hub refuses or can't be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub import errors as hub

    assets.read_config(folder)
    find_tensors(folder)
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in _files(folder).items()]
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        message = commit_message or "Upload a model converted by megabridge"
        done = api.create_commit(repo_id, additions, commit_message=message, revision=revision)
    # Connection errors of the hub's HTTP library are HTTPErrors, not OSErrors; an invalid repository name is a ValueError.
    except (hub.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]
        lines = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"the hub refused {repo_id}: {lines[0]}; check the name and the network, and that HF_TOKEN may write."
        ) from error
    return str(done.commit_url)


def _files(folder: Path) -> dict[str, Path]:
    """Returns the files to upload by repository name. Raises CheckpointError for anything but files inside the folder."""
    found, problems = dict[str, Path](), list[str]()
    for name, state in sorted(entries(folder, apart=manifest.APART)):
        try:
            if not stat.S_ISDIR(state.st_mode) and name not in manifest.APART:
                found[name] = inside(folder, name)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n  ".join(problems))
    return found
