"""`report.json`: its name, its schema, and how an earlier one is read."""

import importlib.resources
from pathlib import Path
from typing import Any

import jsonschema
import orjson

from dflash_inference.request_rows import RequestRow, from_columns
from dflash_train.config import require

REPORT_FILE = "report.json"
REPORT_FORMAT, REPORT_VERSION = "dflash-train/report", 1


def read_schema() -> dict[str, Any]:
    """Read the JSON schema of `report.json`."""
    source = importlib.resources.files("dflash_inference") / "report.schema.json"
    return orjson.loads(source.read_bytes())


def check_schema(findings: dict[str, Any]) -> None:
    """Check the figures against the schema before anybody reads them.

    Raises:
        RuntimeError: They do not fit; the message names the place and not the value.
    """
    place = _first_break(findings)
    if place is not None:
        raise RuntimeError(
            f"report.json breaks its schema at {place}. This is an error in the stage, please "
            "report it."
        )


def read_report(path: Path) -> dict[str, Any]:
    """Read a `report.json`, whichever run wrote it.

    Raises:
        ValueError: It is missing, damaged, or of a version that this one cannot pair with.
    """
    require(path.is_file(), f"{path} is not a file. Give the report.json of an earlier run.")
    try:
        found: dict[str, Any] = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON. Give the report.json of an earlier run.") from error
    place = _first_break(found)
    require(
        place is None,
        f"{path} is no report of this version: it breaks the schema at {place}. Run the stage "
        "'report' of its run again with --force.",
    )
    return found


def report_rows(path: Path) -> dict[str, list[RequestRow]]:
    """Read the requests of a report, by split.

    Raises:
        ValueError: It is no report of this version.
    """
    rows = read_report(path)["requests"]
    return {split: from_columns(columns) for split, columns in rows.items()}


def _first_break(findings: Any) -> str | None:
    """Give the place of the first value that breaks the schema, and the rule; None if all fit."""
    error = next(jsonschema.Draft202012Validator(read_schema()).iter_errors(findings), None)
    return None if error is None else f"{error.json_path} (rule {error.validator!r})"
