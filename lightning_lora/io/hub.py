"""Adapter folders to and from a model hub, through ``huggingface_hub``; nothing but the adapter's own files travels."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lora.dependencies import huggingface_hub
from lightning_lora.io.adapter_file import CONFIG, WEIGHTS
from lightning_lora.io.inspection import read_adapter
from lightning_lora.io.model_card import CARD

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_FILES = [CONFIG, WEIGHTS, CARD]


def push_adapter(
    folder: str | PathLike[str],
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str = "Upload adapter",
    api: HfApi | None = None,
) -> str:
    """Upload an adapter folder, in one commit, after it was found whole; the repository is made if it is not there.

    Args:
        folder: The folder :func:`save_adapter` has written.
        repo: Name of the repository, ``"user/name"``.
        private: Whether a repository that is made now can be seen by its owner alone.
        revision: The branch; None means the main one.
        message: The commit's.
        api: With which token and server; None takes those of the environment.

    Returns:
        Where the commit can be seen.

    Raises:
        AdapterError: If the folder is damaged.
        UnsupportedError: If ``huggingface_hub`` is not installed.
    """
    path = Path(folder)
    read_adapter(path)
    api = huggingface_hub("push_adapter").HfApi() if api is None else api
    api.create_repo(repo_id=repo, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo, folder_path=path, allow_patterns=_FILES, revision=revision, commit_message=message
    )
    return str(commit.commit_url)


def pull_adapter(
    repo: str,
    folder: str | PathLike[str] | None = None,
    *,
    revision: str | None = None,
    api: HfApi | None = None,
) -> Path:
    """Download an adapter and check it; pickles and code are not fetched at all.

    Args:
        repo: Name of the repository, ``"user/name"``.
        folder: Where to; None means the cache of ``huggingface_hub``.
        revision: A branch, tag or commit; None means the main branch. A commit is always the same adapter.
        api: With which token and server; None takes those of the environment.

    Returns:
        The folder, for :func:`load_adapter`.

    Raises:
        AdapterError: If what is there is no whole adapter.
        UnsupportedError: If ``huggingface_hub`` is not installed.
    """
    api = huggingface_hub("pull_adapter").HfApi() if api is None else api
    local = None if folder is None else Path(folder)
    path = Path(api.snapshot_download(repo_id=repo, revision=revision, allow_patterns=_FILES, local_dir=local))
    read_adapter(path)
    return path
