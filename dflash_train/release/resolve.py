"""Where a drafter's files lie: a folder as it is, or a Hub repository that is downloaded first.

Only what a drafter consists of is fetched, pickled weights never. The client's own settings hold:
`HF_HUB_OFFLINE=1` takes what an earlier download left, `HF_ENDPOINT` names another Hub.
"""

import re
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dflash_train.config import UnavailableError, require

DRAFTER_FILES = ("*.json", "*.safetensors", "mask_embedding.pt")
"""Patterns of what is downloaded."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_checkpoint(
    reference: str, *, revision: str | None = None, key: str = "checkpoint"
) -> Path:
    """Give the local folder of a drafter, downloading it if the reference is a Hub id.

    Args:
        reference: A folder, or OWNER/NAME of a model on the Hub.
        revision: Branch, tag or commit there; None takes the default branch. A folder has none.
        key: The recipe's name for the reference, for messages; `{key}_revision` is the other.

    Raises:
        ValueError: It is neither, or the Hub does not give that revision to this user.
        UnavailableError: The Hub cannot be reached, and no earlier download is complete.
    """
    folder = Path(reference).expanduser()
    if folder.is_dir():
        require(
            revision is None,
            f"{key}_revision (={revision}) goes with a Hub id, and {key} (={reference}) is a "
            "folder. Leave it out.",
        )
        # A registry's `current` may mean another drafter while its files are read: follow it once.
        return folder.resolve() if folder.is_symlink() else folder
    require(
        is_hub_id(reference) and not folder.parent.is_dir(),
        f"{key} (={reference}) is not a folder. Give one with config.json in it, or "
        "OWNER/NAME of a drafter on the Hub.",
    )
    return _download(reference, revision, key)


def is_hub_id(name: str) -> bool:
    """Say whether a text has the form OWNER/NAME of a Hub repository."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def _download(repo_id: str, revision: str | None, key: str) -> Path:
    where = f"{key} (={repo_id}) is no folder here, and"
    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=list(DRAFTER_FILES))
        )
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{key}_revision (={revision}) is no branch, tag or commit of {repo_id}. Look "
            "them up on the Hub, or leave it out for the default branch."
        ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"{where} its owner has not granted you access on the Hub. Ask there for it, then run "
            "`hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{where} the Hub knows no such model, or does not show it to you. Check the name; for "
            "a private one run `hf auth login` or set HF_TOKEN."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, HTTPError) as error:
        raise UnavailableError(
            f"{where} the Hub cannot be asked for it ({type(error).__name__}), nor is all of it in "
            "the local cache. Check the network and HF_HUB_OFFLINE, or give a folder."
        ) from error
