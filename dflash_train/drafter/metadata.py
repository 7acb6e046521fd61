"""What servers do not read: `dflash_train.json` beside `config.json` and `model.safetensors`.

The z-lab format has no place for the target's name and revision, for how the drafter was trained,
or for the golden forward. Nothing in the file depends on a clock: two equal runs write equal bytes.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from dflash_train.drafter.golden import GoldenForward

METADATA_NAME = "dflash_train.json"
FORMAT = "dflash-train/checkpoint"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """Our own facts about a checkpoint; what is not known is None or absent."""

    target: dict[str, Any] | None = None
    """The manifests' target block: name, revision, tokenizer hash, chat-template hash, taps."""
    thinking: bool | None = None
    """Whether the target thought aloud in the training answers; None where templates do not ask."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How it was trained: recipe name, code version, package versions, hardware, steps, rows."""
    golden: GoldenForward | None = None
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "CheckpointMetadata":
        """Build it from what `to_json` gave.

        Raises:
            ValueError: Another program or version wrote the content.
            KeyError, TypeError: A field is missing or unknown.
        """
        content = dict(content)
        found = content.pop("format"), content["format_version"]
        if found != (FORMAT, FORMAT_VERSION):
            raise ValueError(
                f"format (={found[0]}, version {found[1]}) must be {FORMAT}, version "
                f"{FORMAT_VERSION}"
            )
        golden = content.pop("golden")
        return cls(
            golden=None if golden is None else GoldenForward.from_json(golden),
            **content,
        )


def write_metadata(folder: Path, metadata: CheckpointMetadata) -> None:
    """Write `dflash_train.json` into an existing checkpoint folder."""
    text = orjson.dumps(metadata.to_json(), option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
    (folder / METADATA_NAME).write_bytes(text + b"\n")


def read_metadata(folder: Path) -> CheckpointMetadata | None:
    """Read `dflash_train.json`; None where there is none, as in a drafter that others trained.

    Raises:
        ValueError: The file is damaged, or another version wrote it.
    """
    path = folder / METADATA_NAME
    if not path.is_file():
        return None
    try:
        return CheckpointMetadata.from_json(orjson.loads(path.read_bytes()))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or foreign: {error}. Delete it, or export the checkpoint again."
        ) from error
