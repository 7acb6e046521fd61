"""The verb `push`: a drafter with its card into a Hub repository, if it may be published.

    dflash-train push recipe=NAME repo_id=OWNER/NAME license=apache-2.0 dry_run=true

Refused by name: an unknown licence, conversations not known to be scrubbed, a drafter without the
report of its own weights, a failing doctor. Nothing else of the run is uploaded.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import safe_open

from dflash_train.config import RecipeConfig, read_flag, require, take_keys
from dflash_train.drafter.checkpoint import CONFIG_NAME, WEIGHTS_NAME, read_config
from dflash_train.drafter.metadata import (
    METADATA_NAME,
    CheckpointMetadata,
    read_metadata,
    write_metadata,
)
from dflash_train.records.manifest import file_hash, write_bytes
from dflash_train.release.evaluation_results import Evaluation, read_evaluation
from dflash_train.release.finding import Status
from dflash_train.release.formats import Format, detect
from dflash_train.release.formats.detection import MASK_EMBEDDING_NAME
from dflash_train.release.hub import (
    CARD_NAME,
    Destination,
    HubFile,
    Pushed,
    card_with_header,
    upload,
)
from dflash_train.release.model_card import (
    CardFacts,
    card_header,
    card_text,
    check_license,
    shown_target,
)
from dflash_train.release.resolve import is_hub_id
from dflash_train.release.run_record import check_scrubbed, read_record, run_of
from dflash_train.stages.examination import Scope, examine_checkpoint
from dflash_train.stages.workshop import Workshop

PUBLISHED = (CONFIG_NAME, WEIGHTS_NAME, MASK_EMBEDDING_NAME)
"""Files of a checkpoint folder that are uploaded as they are, as far as they exist."""
DATA_CARD = ("data_card.md", "data_card.json")
CARD_FOLDER = "push"
"""Folder of the run that keeps a copy of the card."""


@dataclass(frozen=True, kw_only=True)
class PushRequest:
    """What the command line says beside the recipe."""

    repo_id: str = ""
    license: str = ""
    private: bool = True
    dry_run: bool = False
    data_card: bool = False
    """Upload the data card of the run too."""
    without_report: bool = False
    """Publish a drafter of which no report measured these weights."""
    revision: str | None = None
    """Branch of the repository."""
    base_model: str | None = None
    """Hub id of the target where it was loaded from elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What would be uploaded."""

    destination: Destination
    files: list[HubFile]
    card: Path
    """Where a copy of the card lies, with the metadata as they are published."""
    left_out: list[str] = field(default_factory=list)
    """Other names in the checkpoint's folder."""

    def lines(self) -> list[str]:
        """Give the lines of a dry run."""
        place = self.destination
        kind = "private" if place.private else "public"
        branch = f", branch {place.branch}" if place.branch else ""
        total = sum(file.num_bytes for file in self.files)
        return [
            f"to {place.repo_id} ({kind} if it is new{branch}), {len(self.files)} files, "
            f"{total:,} bytes:",
            *(f"  {file.num_bytes:>15,}  {file.name}" for file in self.files),
            *(f"not uploaded: {name}" for name in self.left_out),
            f"card: {self.card}",
        ]


def read_request(arguments: list[str]) -> tuple[PushRequest, list[str]]:
    """Take what belongs to `push` out of the command line; give the recipe's settings too.

    Raises:
        ValueError: A flag is neither true nor false, repo_id or base_model is no Hub id, or the
            licence is missing.
    """
    names = PushRequest.__dataclass_fields__
    words, others = take_keys(arguments, names)
    found = {
        key: read_flag(key, word) if isinstance(names[key].default, bool) else word
        for key, word in words.items()
        if word
    }
    request = PushRequest(**found)  # type: ignore[arg-type]
    require(
        is_hub_id(request.repo_id),
        f"repo_id (={request.repo_id or 'unset'}) must be OWNER/NAME, as on the Hub. Add "
        "repo_id=OWNER/NAME.",
    )
    require(
        request.base_model is None or is_hub_id(request.base_model),
        f"base_model (={request.base_model}) must be the target's OWNER/NAME on the Hub.",
    )
    check_license(request.license)
    return request, others


def push(publication: Publication) -> Pushed:
    """Upload what `prepare` found fit.

    Raises:
        ValueError: The Hub does not let this user write there.
        UnavailableError: The Hub cannot be reached.
    """
    name = publication.destination.repo_id.split("/")[-1]
    message = f"Upload {name} with dflash-train"
    return upload(publication.files, publication.destination, message=message)


def prepare(config: RecipeConfig, request: PushRequest, scope: Scope) -> Publication:
    """Check what `push` refuses, write the card into the run's folder and list the files.

    Args:
        config: The recipe; it names the checkpoint.
        request: What the command says beside it.
        scope: What the doctor may hold against the checkpoint.

    Raises:
        ValueError: One of the refusals; the message names it.
    """
    folder = Workshop(config).checkpoint
    _check_layout(folder)
    weights_hash = file_hash(folder / WEIGHTS_NAME)
    # A report of these weights ties a copy of the drafter to the run as well.
    run_dir = run_of(folder) or (None if request.without_report else config.run_dir)
    evaluation = None
    if run_dir is not None and not request.without_report:
        evaluation = _evaluation(run_dir, weights_hash)
    if run_dir is not None:
        check_scrubbed(run_dir)
    _require_healthy(config, scope)
    facts = _facts(request, folder, run_dir, evaluation, weights_hash)
    place = (run_dir or config.run_dir) / CARD_FOLDER
    readme = card_with_header(card_header(facts), card_text(facts))
    write_bytes(place / CARD_NAME, readme)
    names = [path.name for path in sorted(folder.iterdir())]
    files = [HubFile(name=n, content=folder / n) for n in PUBLISHED if n in names]
    if facts.metadata is not None:
        files.append(_metadata_file(facts.metadata, place, base_model=facts.base_model))
    files.append(HubFile(name=CARD_NAME, content=readme))
    if request.data_card:
        files += _data_card(run_dir)
    return Publication(
        destination=Destination(
            repo_id=request.repo_id, private=request.private, branch=request.revision
        ),
        files=files,
        card=place / CARD_NAME,
        left_out=[name for name in names if name not in (*PUBLISHED, METADATA_NAME)],
    )


def _check_layout(folder: Path) -> None:
    require(
        (folder / WEIGHTS_NAME).is_file(),
        f"checkpoint (={folder}) holds no {WEIGHTS_NAME}. Run `train` first, or give "
        "checkpoint=DIR.",
    )
    found = detect(folder)
    require(
        found is Format.zlab,
        f"checkpoint (={folder}) is of the dialect {found.value}, and push uploads zlab, which "
        "every server reads. Run `dflash-train export format=zlab` first.",
    )


def _metadata_file(metadata: CheckpointMetadata, place: Path, *, base_model: str | None) -> HubFile:
    """Give `dflash_train.json` as it is published: without the folder of the target."""
    if metadata.target is not None:
        name = shown_target(metadata.target)
        public = base_model if base_model and name != metadata.target["name"] else name
        metadata = replace(metadata, target={**metadata.target, "name": public})
    write_metadata(place, metadata)
    return HubFile(name=METADATA_NAME, content=place / METADATA_NAME)


def _evaluation(run_dir: Path, weights_hash: str) -> Evaluation:
    path = run_dir / "report" / "report.json"
    require(
        path.is_file(),
        f"{path} does not exist, and a card without measurements says nothing about acceptance. "
        "Run `dflash-train report` for this drafter, or add without_report=true.",
    )
    return read_evaluation(path, weights_hash=weights_hash)


def _require_healthy(config: RecipeConfig, scope: Scope) -> None:
    findings = examine_checkpoint(config, scope)
    failed = [finding for finding in findings if finding.status is Status.failed]
    said = "; ".join(f"{each.check}: {each.sentence} {each.remedy}" for each in failed)
    require(not failed, f"{len(failed)} checks of the doctor failed: {said}")


def _facts(
    request: PushRequest,
    folder: Path,
    run_dir: Path | None,
    evaluation: Evaluation | None,
    weights_hash: str,
) -> CardFacts:
    metadata = read_metadata(folder)
    record = read_record(run_dir, metadata, weights_hash=weights_hash)
    target_name = "" if record.target is None else str(record.target["name"])
    num_parameters, dtype = _describe_weights(folder / WEIGHTS_NAME)
    return CardFacts(
        repo_id=request.repo_id,
        license_id=request.license,
        base_model=request.base_model or (target_name if is_hub_id(target_name) else None),
        config=read_config(folder),
        num_parameters=num_parameters,
        dtype=dtype,
        metadata=metadata,
        record=record,
        evaluation=evaluation,
        weights_hash=weights_hash,
        has_data_card=request.data_card,
    )


def _describe_weights(path: Path) -> tuple[int, str]:
    """Give the number of parameters and their number format; the doctor has seen both."""
    with safe_open(path, framework="pt") as file:
        slices = [file.get_slice(name) for name in file.keys()]
    floats = [each for each in slices if "F" in each.get_dtype()]  # ids of a reduced vocabulary
    spelt = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[floats[0].get_dtype()]
    return sum(math.prod(each.get_shape()) for each in floats), spelt


def _data_card(run_dir: Path | None) -> list[HubFile]:
    require(
        run_dir is not None and (run_dir / "conversations" / DATA_CARD[0]).is_file(),
        "data_card (=true) needs the run that trained this drafter, with its data card. Run "
        "`dflash-train ingest`, or leave data_card out.",
    )
    assert run_dir is not None
    return [HubFile(name=n, content=run_dir / "conversations" / n) for n in DATA_CARD]
