import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import datasets.config as config_of_datasets
import orjson
import pytest
import yaml

from dflash_data.dataset_repository import SCHEMA, export_dataset, record_of
from dflash_data.ingest.stage import ingest
from dflash_data.privacy.pseudonyms import load_pseudonyms
from dflash_data.sample_traffic.fleet import write_sample_traffic
from dflash_train.cli import main
from dflash_train.config import ExecutorConfig, RecipeConfig, TargetConfig
from dflash_train.records.conversation import (
    SPLITS,
    Conversation,
    Turn,
    read_shard,
    read_split,
    write_shard,
)
from dflash_train.records.manifest import FileEntry, Manifest

PRIVATE = "ana@example.org"


def fleet_line(number: int) -> bytes:
    """Give a call with all that a record can hold: tools, reasoning, ids, a private value."""
    request = {
        "model": "small",
        "temperature": 0.5,
        "user": "acme" if number % 3 else "globex",
        "metadata": {"session_id": f"own-{number}"},
        "tools": [{"type": "function", "function": {"name": f"find_{number}"}}],
        "messages": [
            {"role": "user", "content": f"Write to {PRIVATE} about lot {number}: \u00e9\n\u65e5"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": f"c{number}", "type": "function",
                 "function": {"name": "find", "arguments": '{"lot": 7}'}}]},
            {"role": "tool", "tool_call_id": f"c{number}", "content": "row 2"},
        ],
    }  # fmt: skip
    answer = {"role": "assistant", "content": f"Lot {number}.", "reasoning_content": "Look."}
    response = {"choices": [{"index": 0, "message": answer, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 9}}  # fmt: skip
    moment = 1_792_000_000 + 86_400 * (number % 28)
    call = {"id": f"own-{number}", "created": moment, "request": request, "response": response}
    return orjson.dumps(call) + b"\n"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RecipeConfig:
    """A run whose ingest is complete."""
    folder = tmp_path_factory.mktemp("published")
    log = folder / "traffic.jsonl"
    write_sample_traffic(log, seed=3, num_requests=120)
    with log.open("ab") as stream:
        stream.writelines(fleet_line(number) for number in range(30))
    made = RecipeConfig(
        name="run",
        runs_dir=str(folder),
        target=TargetConfig(name_or_path="none"),
        executor=ExecutorConfig(workers=1),
    )
    ingest(made, log, evaluation={}, manifest=Manifest(stage="ingest", recipe_hash="sha256:0"))
    return made


@pytest.fixture
def conversations(config: RecipeConfig) -> Path:
    return config.run_dir / "conversations"


@pytest.fixture(scope="module")
def exported(config: RecipeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "dataset"
    source = config.run_dir / "conversations"
    export_dataset(source, out, license_id="cc-by-4.0", excluded=frozenset())
    return out


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = config_of_datasets.HF_DATASETS_CACHE
    config_of_datasets.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    config_of_datasets.HF_DATASETS_CACHE = before


def test_datasets_loads_every_split_and_its_rows_are_the_records(
    exported: Path, conversations: Path
):
    loaded: Any = datasets.load_dataset(str(exported))
    assert list(loaded) == list(SPLITS)
    for split in SPLITS:
        rows = [record_of(row) for row in loaded[split]]
        assert rows == list(read_split(conversations, split))
    records = [record_of(row) for split in SPLITS for row in loaded[split]]
    assert any(record.tools and record.messages[1].tool_calls for record in records)
    assert any(record.privacy.spans for record in records)
    assert any(record.ts is None for record in records) or any(not r.tools for r in records)


def test_rows_stream_in_the_same_order_with_the_same_columns(exported: Path):
    loaded = datasets.load_dataset(str(exported), split="test")
    streamed = datasets.load_dataset(str(exported), split="test", streaming=True)
    assert isinstance(loaded, datasets.Dataset)
    assert isinstance(streamed, datasets.IterableDataset)
    assert list(streamed) == loaded.to_list()
    assert streamed.features == loaded.features
    assert set(loaded.column_names) == set(SCHEMA.names) == set(Conversation.__struct_fields__)


def test_a_column_that_is_empty_everywhere_keeps_its_type(exported: Path):
    loaded = datasets.load_dataset(str(exported))
    for split in SPLITS:
        assert loaded[split].features == loaded["train"].features
        assert loaded[split].features["adapter"] == datasets.Value("string")
        assert set(loaded[split]["adapter"]) == {None}


def test_the_card_has_licence_and_splits_and_the_counts_of_the_data_card(
    exported: Path, conversations: Path
):
    _, header, body = (exported / "README.md").read_text().split("---\n", 2)
    meta = yaml.safe_load(header)
    assert meta["license"] == "cc-by-4.0"
    (default,) = meta["configs"]
    assert [files["split"] for files in default["data_files"]] == list(SPLITS)
    card = json.loads((conversations / "data_card.json").read_bytes())
    assert f"{card['read']} calls read, {card['kept']} records kept" in body
    loaded = datasets.load_dataset(str(exported))
    for split in SPLITS:
        assert len(loaded[split]) == card["splits"][split]["rows"]
        assert f"| {split} | {len(loaded[split])} |" in body
    assert (exported / "data_card.json").read_bytes() == (
        conversations / "data_card.json"
    ).read_bytes()


def test_no_content_of_the_log_is_in_the_card(exported: Path, conversations: Path):
    readme = (exported / "README.md").read_text()
    texts = {
        turn.content
        for split in SPLITS
        for record in read_split(conversations, split)
        for turn in record.messages
        if turn.content and len(turn.content) > 8
    }
    assert len(texts) > 100
    assert not [text for text in texts if text in readme]


def test_the_manifest_vouches_for_every_file_and_names_a_changed_one(
    config: RecipeConfig, conversations: Path, tmp_path: Path
):
    out = tmp_path / "dataset"
    written = export_dataset(conversations, out, license_id="mit", excluded=frozenset())
    assert Manifest.read(out) == written
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {entry.path for entry in written.outputs} | {"manifest.json"}
    source = Manifest.read(conversations)
    assert source is not None
    assert source.counts is not None
    assert written.counts is not None
    assert written.counts.kept == source.counts.kept
    again = export_dataset(conversations, out, license_id="mit", excluded=frozenset())
    assert again.outputs == written.outputs
    shard = out / "data" / "test-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"2")
    with pytest.raises(ValueError, match=r"test-00000\.parquet does not match its checksum"):
        written.verify_outputs(out)


def test_a_record_that_is_not_scrubbed_is_refused_and_nothing_is_written(
    conversations: Path, tmp_path: Path
):
    copy = tmp_path / "conversations"
    copy.mkdir()
    for path in conversations.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    manifest = Manifest.read(copy)
    assert manifest is not None
    entry = next(each for each in manifest.outputs if each.path.startswith("test-") and each.rows)
    records = list(read_shard(copy / entry.path))
    records[-1].privacy.scrubbed = False
    records[-1].messages = [Turn(role="user", content=PRIVATE)]
    write_shard(copy / entry.path, records)
    place = manifest.outputs.index(entry)
    manifest.outputs[place] = FileEntry.of(copy / entry.path, copy, rows=entry.rows)
    manifest.write(copy)
    out = tmp_path / "dataset"
    with pytest.raises(ValueError, match=r"privacy\.scrubbed=false") as caught:
        export_dataset(copy, out, license_id="mit", excluded=frozenset())
    assert PRIVATE not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["conversations"]


def test_a_customer_who_opted_out_is_refused(
    config: RecipeConfig, conversations: Path, tmp_path: Path
):
    excluded = frozenset({load_pseudonyms(config).hide("tenant", "globex")})
    with pytest.raises(ValueError, match=r"data\.excluded_tenants"):
        export_dataset(conversations, tmp_path / "x", license_id="mit", excluded=excluded)
    other = frozenset({load_pseudonyms(config).hide("tenant", "nobody")})
    export_dataset(conversations, tmp_path / "x", license_id="mit", excluded=other)


def test_damaged_conversations_are_refused_by_name(conversations: Path, tmp_path: Path):
    copy = tmp_path / "conversations"
    copy.mkdir()
    for path in conversations.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    shard = sorted(copy.glob("train-*"))[0]
    shard.write_bytes(gzip.compress(gzip.decompress(shard.read_bytes()) + b"\n"))
    with pytest.raises(ValueError, match=f"{shard.name} does not match"):
        export_dataset(copy, tmp_path / "x", license_id="mit", excluded=frozenset())


@pytest.mark.parametrize("license_id", ["", "MIT", "a b", "x\ny"])
def test_a_licence_is_required(license_id: str, conversations: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"license \(="):
        export_dataset(conversations, tmp_path / "x", license_id=license_id, excluded=frozenset())


def test_a_folder_of_somebody_else_is_never_replaced(conversations: Path, tmp_path: Path):
    out = tmp_path / "home"
    out.mkdir()
    (out / "letter.txt").write_text("keep me")
    for place in (out, out / "letter.txt", conversations):
        with pytest.raises(ValueError, match="no exported dataset"):
            export_dataset(conversations, place, license_id="mit", excluded=frozenset())
    assert (out / "letter.txt").read_text() == "keep me"


def test_the_command_exports_what_ingest_wrote_and_refuses_a_later_opt_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    log = tmp_path / "traffic.jsonl"
    log.write_bytes(b"".join(fleet_line(number) for number in range(60)))
    settings = ["recipe=smollm2", "name=run", f"runs_dir={tmp_path}", f"data.logs={log}",
                "target.name_or_path=none", "evaluate.eval_sets=[]",
                "executor.workers=1"]  # fmt: skip
    assert main(["ingest", *settings]) == 0
    assert main(["export-dataset", *settings]) == 2
    assert "license (=)" in capsys.readouterr().err
    assert main(["export-dataset", *settings, "license=other"]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    assert folder == tmp_path / "run" / "dataset"
    assert len(datasets.load_dataset(str(folder), split="train")) > 0
    later = ["license=other", f"out={tmp_path / 'later'}", "data.excluded_tenants=[globex]"]
    assert main(["export-dataset", *settings, *later]) == 2
    assert "other settings" in capsys.readouterr().err
    assert not (tmp_path / "later").exists()
