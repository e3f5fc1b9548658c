"""Uploads a published folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from megabridge.checkpoint import assets
from megabridge.checkpoint.hf import find_tensors
from megabridge.errors import CheckpointError


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

    It is one commit: nobody can download a half of the model. One rank calls it. Raises CheckpointError for a folder that is no
    complete model, and when the hub refuses or is out of reach.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub import errors as hub

    assets.read_config(folder)
    find_tensors(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    additions = [CommitOperationAdd(path_in_repo=str(file.relative_to(folder)), path_or_fileobj=file) for file in files]
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
