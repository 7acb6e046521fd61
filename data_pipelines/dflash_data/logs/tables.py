"""Rows of Parquet files and hub datasets as lines, through `datasets` in streaming mode."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from dflash_data.adapters.log_format import Line
from dflash_train.records.manifest import content_hash, file_hash

HUB_PREFIX = "hub:"
BATCH_ROWS = 256
"""Rows turned into Python objects at once."""


def read_parquet(address: str, name: str) -> Iterator[Line]:
    """Yield each row of a Parquet file as a JSON object; memory holds a row group.

    Raises:
        ValueError: The file is damaged; its index stands at the end, so nothing can be kept.
    """
    with _datasets() as datasets:
        try:
            rows = datasets.load_dataset(
                "parquet", data_files=address, split=datasets.Split.TRAIN, streaming=True
            )
            yield from _lines_of(rows, name)
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(
                f"data.logs (={address}) cannot be read as Parquet ({type(error).__name__}). "
                "Copy the file again, or leave it out."
            ) from error


def read_hub(address: str) -> Iterator[Line]:
    """Yield each row of `hub:ID` or `hub:ID#config/split` as a JSON object.

    Raises:
        ValueError: There is no such dataset, configuration or split.
    """
    with _datasets() as datasets:
        yield from _lines_of(_load_hub(datasets, address), address.removeprefix(HUB_PREFIX))


def hub_bytes(address: str) -> int | None:
    """Give the size of a hub dataset in bytes; None if its card does not say.

    Raises:
        ValueError: There is no such dataset, configuration or split.
    """
    with _datasets() as datasets:
        info = _load_hub(datasets, address).info
    return info.dataset_size or info.download_size


def hub_revision(address: str) -> str:
    """Give the commit of a hub dataset, as `datasets` resolves it; of a folder, its files' hash."""
    dataset, choice = _split_hub_address(address)
    folder = Path(dataset)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return content_hash([[str(path.relative_to(folder)), file_hash(path)] for path in files])
    with _datasets() as datasets:
        return str(datasets.load_dataset_builder(dataset, choice.partition("/")[0] or None).hash)


def _split_hub_address(address: str) -> tuple[str, str]:
    """Give the dataset's id and what stands after `#`, empty if nothing does."""
    dataset, _, choice = address.removeprefix(HUB_PREFIX).partition("#")
    return dataset, choice


def _load_hub(datasets: Any, address: str) -> Any:
    dataset, choice = _split_hub_address(address)
    config, _, split = choice.partition("/")
    try:
        return datasets.load_dataset(
            dataset, config or None, split=split or "train", streaming=True
        )
    except (ValueError, OSError) as error:
        raise ValueError(
            f"data.logs (={address}) cannot be opened ({type(error).__name__}). Give it as "
            "hub:ID or hub:ID#config/split, with a configuration and split that the dataset has; "
            "a private one needs HF_TOKEN."
        ) from error


def _lines_of(rows: Any, name: str) -> Iterator[Line]:
    number = 0
    for table in rows.with_format("arrow").iter(batch_size=BATCH_ROWS):
        for row in table.to_pylist():
            yield Line(f"{name}:{number}", orjson.dumps(row, default=_as_text))
            number += 1


def _as_text(value: Any) -> str:
    """Give what JSON has no type for: binary columns and decimals."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


@contextlib.contextmanager
def _datasets() -> Iterator[Any]:
    """Give the module `datasets`, kept from importing torch: its streams would, to no use here."""
    import datasets
    from datasets import config

    had_torch = config.TORCH_AVAILABLE
    config.TORCH_AVAILABLE = False
    try:
        yield datasets
    finally:
        config.TORCH_AVAILABLE = had_torch
