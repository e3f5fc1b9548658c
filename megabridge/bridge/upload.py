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
    """Puts everything in `folder` into the model repository `repo_id`, which is made where it is missing. Returns the commit's URL.

    It is one commit: nobody can download a half of the model. Git's own files and the notes of a download stay here. One rank
    calls it. Raises CheckpointError for a folder that is no complete model, or has links that lead out of it, and when the hub
    refuses or is out of reach.
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
    # Connection errors of the hub's HTTP library are HTTPErrors and not OSErrors; a name that can't be one is a ValueError.
    except (hub.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]
        lines = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"the hub didn't take {repo_id}: {lines[0]}; check the name and the network, and that HF_TOKEN may write."
        ) from error
    return str(done.commit_url)


def _files(folder: Path) -> dict[str, Path]:
    """What is uploaded, by its name in the repository. Raises CheckpointError for what doesn't lie in the folder, or is no file."""
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
