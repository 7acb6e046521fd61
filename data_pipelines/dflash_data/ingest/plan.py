"""What every task of the ingest stage knows: the recipe, the parts of the log, where to work.

datatrove writes the attributes of a step to disk as JSON, a pickle of it on Slurm. So a step has
one attribute that matters, this plan, whose text form is empty; customers to leave out are in it
as keyed hashes, and the key is not in it at all: each task loads it where the recipe says, and
checks that it is the one of the process that made the plan.
"""

from dataclasses import replace
from pathlib import Path

from dflash_data.ingest.decontaminate import EvaluationText
from dflash_data.logs.sources import LogPart
from dflash_data.privacy.pseudonyms import Pseudonyms, load_pseudonyms
from dflash_data.privacy.text_of_ids import FORMATS_WITH_IDS, TextOfIds
from dflash_train.config import DataConfig, RecipeConfig
from dflash_train.features.target_folder import find_tokenizer_file

BUCKET_BYTES = 16 << 20
"""Bytes of log per bucket, about: what one task holds in memory at a time."""


class IngestPlan:
    """The work of one run; a plain class, since dataclasses are printed with all they hold."""

    def __init__(
        self,
        config: RecipeConfig,
        parts: list[LogPart],
        work: Path,
        evaluation: EvaluationText,
        *,
        pseudonyms: Pseudonyms | None = None,
    ) -> None:
        """Plan without touching the log.

        Args:
            config: The recipe.
            parts: The log; its size alone decides the number of buckets.
            work: Absolute folder of temporary files.
            evaluation: What may not recur in training.
            pseudonyms: For plans that are not carried out; the others find or make the key.
        """
        self.rehearsal = pseudonyms
        pseudonyms = pseudonyms or load_pseudonyms(config)
        names = config.data.excluded_tenants
        self.excluded = frozenset(pseudonyms.hide("tenant", name) for name in names)
        self.config = replace(config, data=replace(config.data, excluded_tenants=[]))
        self.key_mark = _mark_of(pseudonyms)
        self.parts = parts
        self.tokenizer = tokenizer_of(config, parts)
        self.num_buckets = 1 + sum(part.num_bytes for part in parts) // BUCKET_BYTES
        self.work = work
        self.evaluation = evaluation

    def __repr__(self) -> str:
        return "IngestPlan"

    def __deepcopy__(self, memo: dict[int, object]) -> "IngestPlan":
        """Give the plan itself: tasks do not change it, and datatrove copies steps for each."""
        return self

    @property
    def data(self) -> DataConfig:
        """The settings of the data stages, without the names of customers."""
        return self.config.data

    def pseudonyms(self) -> Pseudonyms:
        """Load the key.

        Raises:
            ValueError: This process finds another key than the one that made the plan.
        """
        pseudonyms = load_pseudonyms(self.config)
        if _mark_of(pseudonyms) != self.key_mark:
            raise ValueError(
                "data.hmac_key_file or DFLASH_HMAC_KEY gives another key to a task than to the "
                "command that started it. Set data.hmac_key_file to a file that all nodes share."
            )
        return pseudonyms

    def text_of_ids(self) -> TextOfIds:
        """Give the decoder of ids that stand in place of text."""
        return TextOfIds(self.tokenizer)

    def partition(self, rank: int) -> Path:
        """Give the file of scrubbed records of one reading task."""
        return self.work / "parts" / f"{rank:05d}.zst"

    def moments(self, rank: int) -> Path:
        """Give the file with the first and last time that one reading task saw."""
        return self.work / "parts" / f"{rank:05d}.moments.json"

    def spread(self, bucket: int) -> Path:
        """Give the file with the records of a crowded bucket; it is there for no other."""
        return self.work / "spread" / f"{bucket:05d}.zst"

    def bucket_files(self, bucket: int) -> list[Path]:
        """Give the partition files that hold the records of one bucket, once all are spread."""
        spread = sorted(self.spread(0).parent.glob("*.zst"))
        if self.spread(bucket) in spread:
            return spread
        return [self.partition(rank) for rank in range(len(self.parts))] + spread

    def chained(self, bucket: int) -> Path:
        """Give the file of the exploded records of one bucket."""
        return self.work / "chained" / f"{bucket:05d}.zst"

    def decided(self, bucket: int) -> Path:
        """Give the file with the decisions on one bucket."""
        return self.work / "decided" / f"{bucket:05d}.bin"

    def index_part(self, bucket: int) -> Path:
        """Give the file with the index lines of one bucket."""
        return self.work / "index" / f"{bucket:05d}.arrow"

    @property
    def rows(self) -> Path:
        """The folder of index arrays."""
        return self.work / "rows"

    @property
    def facts(self) -> Path:
        """The file of what the third phase counted by split."""
        return self.work / "decided" / "splits.json"

    @property
    def out(self) -> Path:
        """The folder that becomes `conversations/`."""
        return self.work / "conversations"


def tokenizer_of(config: RecipeConfig, parts: list[LogPart]) -> Path | None:
    """Give the target's tokenizer file if the log may need it; None, too, where it is not here."""
    needed = any(part.format in FORMATS_WITH_IDS for part in parts)
    return find_tokenizer_file(config.target) if needed else None


def _mark_of(pseudonyms: Pseudonyms) -> str:
    return pseudonyms.hide("key", "the same key gives the same mark")
