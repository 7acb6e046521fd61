"""The data card: what is in `conversations/` and what was taken out, in counts only.

It stands beside the data as JSON, for programs, and as Markdown, for a privacy officer. No
value, example or n-gram of the log is in it.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from dflash_data.drops import DropReason
from dflash_data.privacy.scrub import POLICY
from dflash_train.config import DataConfig
from dflash_train.records.manifest import Counts, write_bytes

NAME = "data_card"
FORMAT = "dflash.data_card"
FORMAT_VERSION = 1


def data_card(
    totals: Counter[str],
    counts: Counts,
    splits: Mapping[str, Mapping[str, Any]],
    data: DataConfig,
    eval_names: list[str],
) -> dict[str, Any]:
    """Put the counts of the ingest stage into order.

    Args:
        totals: All counts of the phases by name.
        counts: The books.
        splits: Rows, sessions, tenants and time range by split.
        data: The limits that were set.
        eval_names: Evaluation sets that training was kept clear of.
    """
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "sources": _named(totals, "source/"),
        "read": counts.read,
        "kept": counts.kept,
        "dropped": counts.dropped,
        "answers": _named(totals, "policy/"),
        "without_model": totals["without_model"],
        "served_model": data.served_model,
        "token_ids": _named(totals, "ids/"),
        "undecoded": totals["undecoded"],
        "privacy": {
            "policy": POLICY,
            "records_touched": totals["records_touched"],
            "redactions": _named(totals, "redacted/"),
            "dropped_for_secrets": counts.dropped[DropReason.secret_in_answer.value],
            "opted_out": counts.dropped[DropReason.excluded_tenant.value],
            "num_excluded_tenants": len(data.excluded_tenants),
            "expired": counts.dropped[DropReason.expired.value],
            "max_age_days": data.max_age_days,
            "retention_date": data.retention_date,
        },
        "contaminated": {name: totals[f"contaminated/{name}"] for name in eval_names},
        "repeats": {
            "merged": totals["merged_repeats"],
            "clusters": totals["clusters"],
            "clustered_records": totals["clustered_records"],
            "largest_cluster": totals["largest_cluster"],
            "max_per_cluster": data.max_per_cluster,
            "removed_by_cap": counts.dropped[DropReason.cluster_cap.value],
        },
        "splits": splits,
        "sessions": totals["sessions"],
        "sessions_not_time_based": totals["sessions_not_time_based"],
        "is_time_based": totals["sessions_not_time_based"] == 0,
    }


def write_data_card(folder: Path, card: Mapping[str, Any]) -> list[Path]:
    """Write the card as `data_card.json` and `data_card.md`, and give both paths."""
    paths = [folder / f"{NAME}.json", folder / f"{NAME}.md"]
    write_bytes(paths[0], orjson.dumps(card, option=orjson.OPT_INDENT_2) + b"\n")
    write_bytes(paths[1], as_markdown(card).encode())
    return paths


def as_markdown(card: Mapping[str, Any]) -> str:
    """Give the card as Markdown tables."""
    privacy, repeats = card["privacy"], card["repeats"]
    num_untimed, num_sessions = card["sessions_not_time_based"], card["sessions"]
    by_time = (
        "Splits are by time: test is newest, validation the window before."
        if card["is_time_based"]
        else f"{num_untimed} of {num_sessions} sessions have no usable time: their split is a "
        "hash, not time-based."
    )
    sections = [
        "# Data card",
        f"{card['read']} calls read, {card['kept']} records kept. Counts only.",
        _table("Source", "calls", card["sources"]),
        _table("Dropped as", "calls", _nonzero(card["dropped"])),
        _undecoded(card["undecoded"]),
        _table("Answers", "records", card["answers"]),
        _without_model(card["without_model"], card["served_model"]),
        _table("Token ids of the log", "records", card["token_ids"]),
        f"## Privacy\n\n{privacy['records_touched']} records hold redactions (policy "
        f"{privacy['policy']}); {privacy['dropped_for_secrets']} were dropped for a secret in the "
        f"answer, {privacy['opted_out']} for an opt-out, {privacy['expired']} as expired.",
        _table("Redacted kind/role", "places", privacy["redactions"]),
        "## Evaluation and repeats\n\nRecords of train and validation dropped because they share "
        f"text with an evaluation set. {repeats['merged']} repeats were merged and "
        f"{repeats['removed_by_cap']} near-duplicates beyond {repeats['max_per_cluster']} a "
        f"cluster removed; {repeats['clusters']} clusters hold {repeats['clustered_records']} "
        f"records, the largest {repeats['largest_cluster']}. Test keeps its repetitions.",
        _table("Evaluation set", "dropped", card["contaminated"]),
        f"## Splits\n\n{by_time}",
        _split_table(card["splits"]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _undecoded(num_calls: int) -> str:
    """Tell of calls whose text could not be read; nothing if there are none."""
    if not num_calls:
        return ""
    return (
        f"{num_calls} calls hold text as token ids only, which the target's tokenizer did not "
        "decode: it is not on this machine, or not the one that wrote them. They were dropped, "
        "since nobody could look for private values in them. Download the target, then run "
        "`ingest` again."
    )


def _without_model(num_calls: int, served_model: str | None) -> str:
    """Tell of calls whose log names no model; nothing if there are none."""
    if not num_calls:
        return ""
    taken = (
        f"Their answers were taken for those of data.served_model (={served_model})."
        if served_model
        else "Their answers count as another model's. If the target's server wrote them, set "
        "data.served_model."
    )
    return f"{num_calls} calls stand in logs of a server that name no model. {taken}"


def _named(totals: Mapping[str, int], prefix: str) -> dict[str, int]:
    found = ((name, count) for name, count in sorted(totals.items()) if name.startswith(prefix))
    return {name.removeprefix(prefix): count for name, count in found}


def _nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def _table(name: str, unit: str, counts: Mapping[str, int]) -> str:
    lines = [f"| {key} | {count} |" for key, count in counts.items()]
    return "\n".join([f"| {name} | {unit} |", "|---|---|", *lines]) if lines else ""


def _split_table(splits: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        f"| {name} | {facts['rows']} | {facts['sessions']} | {facts['tenants']} | "
        f"{facts['first'] or '-'} | {facts['last'] or '-'} |"
        for name, facts in splits.items()
    ]
    head = "| Split | records | sessions | tenants | first | last |"
    return "\n".join([head, "|---|---|---|---|---|---|", *lines])
