"""Files into a repository of the Hub through its own client: one commit, resumable, read back.

The client sends large files first and commits last, so a reader never sees half an upload; a second
try sends what is missing. After the commit sizes and hashes are read back and compared.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from dflash_train.config import UnavailableError, require
from dflash_train.release.evaluation_results import AcceptanceRow
from dflash_train.release.model_card import CardHeader

CARD_NAME = "README.md"


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """One file of the repository."""

    name: str
    content: Path | bytes

    @property
    def num_bytes(self) -> int:
        """Give its size."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where an upload goes."""

    repo_id: str
    """OWNER/NAME."""
    private: bool = True
    """Whether a new repository is private; into a public one only `False` uploads."""
    branch: str | None = None
    """None is the default branch; another is made where it does not exist."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What an upload came to."""

    url: str
    """Of the commit."""
    commit: str
    is_private: bool


def card_with_header(header: CardHeader, text: str) -> bytes:
    """Give the content of README.md: YAML for the Hub's machinery, then the text."""
    data = ModelCardData(
        license=header.license_id,
        base_model=header.base_model,
        pipeline_tag="text-generation",
        tags=list(header.tags),
        model_name=header.model_name if header.results else None,
        eval_results=[_eval_result(row) for row in header.results] or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}".encode()


def _eval_result(row: AcceptanceRow) -> EvalResult:
    low, high = row.interval
    return EvalResult(
        task_type="text-generation",
        task_name="Speculative decoding",
        dataset_type=row.key,
        dataset_name=row.label,
        metric_type="acceptance_length",
        metric_name="Acceptance length, tokens per verify step, pooled (greedy)",
        metric_value=round(row.pooled, 4),
        metric_args={
            "interval_95": [round(low, 4), round(high, 4)],
            "num_requests": row.num_requests,
            "num_steps": row.num_steps,
        },
    )


def upload(files: Sequence[HubFile], destination: Destination, *, message: str) -> Pushed:
    """Commit files to a repository, which is made if it does not exist, and read them back.

    What is there already is not sent again: neither unchanged files nor large ones that a broken
    upload had finished.

    Raises:
        ValueError: The name is none, the user may not write there, or the repository is public and
            `destination.private` is not False.
        UnavailableError: The Hub cannot be reached or failed; or what it holds is not what was
            sent.
    """
    where = f"repo_id (={destination.repo_id})"
    try:
        return _upload(files, destination, message=message)
    except UnavailableError:
        raise
    except HFValidationError as error:
        raise ValueError(f"{where} must be OWNER/NAME, as on the Hub: {error}") from error
    except OfflineModeIsEnabled as error:
        raise UnavailableError(
            f"{where}: HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
            raise ValueError(
                f"{where}: the Hub lets this user not write there (HTTP {status}). Run `hf auth "
                "login` or set HF_TOKEN to a token with write access, and check the owner."
            ) from error
        raise UnavailableError(
            f"{where}: the Hub answered HTTP {status}. Run the command again: what was sent stays."
        ) from error
    except (HTTPError, RuntimeError) as error:  # the client wraps a failed transfer in the latter
        raise UnavailableError(
            f"{where}: the upload broke off ({error}). Run the command again: what was sent stays."
        ) from error


def _upload(files: Sequence[HubFile], destination: Destination, *, message: str) -> Pushed:
    api, repo_id, branch = HfApi(), destination.repo_id, destination.branch
    api.create_repo(repo_id, private=destination.private, exist_ok=True)
    is_private = bool(api.repo_info(repo_id).private)
    require(
        is_private or not destination.private,
        f"repo_id (={repo_id}) is public, and push makes nothing public by itself. Add "
        "private=false, or make the repository private on the Hub.",
    )
    if branch is not None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    with warnings.catch_warnings():  # the Hub's advice on the card, which the client raises as such
        warnings.simplefilter("ignore", UserWarning)
        commit = api.create_commit(
            repo_id,
            operations=[
                CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content)
                for file in files
            ],
            commit_message=message,
            revision=branch,
        )
    _check_read_back(api, files, repo_id, commit.oid)
    return Pushed(url=str(commit.commit_url), commit=commit.oid, is_private=is_private)


def _check_read_back(api: HfApi, files: Sequence[HubFile], repo_id: str, commit: str) -> None:
    """Compare what the Hub says it holds with what was sent."""
    listed = api.get_paths_info(repo_id, [file.name for file in files], revision=commit)
    found = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
    wrong = [file.name for file in files if not _is_same(file, found.get(file.name))]
    if wrong:
        raise UnavailableError(
            f"repo_id (={repo_id}): {', '.join(wrong)} of commit {commit} are not what was sent. "
            "Do not use that commit; run the command again."
        )


def _is_same(file: HubFile, entry: RepoFile | None) -> bool:
    if entry is None or entry.size != file.num_bytes:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == _digest(file, hashlib.sha256())
    return entry.blob_id == _digest(file, hashlib.sha1(f"blob {file.num_bytes}\0".encode()))


def _digest(file: HubFile, hasher: "hashlib._Hash") -> str:
    if isinstance(file.content, bytes):
        hasher.update(file.content)
    else:
        with file.content.open("rb") as stream:
            while block := stream.read(1 << 20):
                hasher.update(block)
    return hasher.hexdigest()
