"""What `ingest` leaves out, marks or refuses."""

import gzip
import json
from pathlib import Path

import pytest

from dflash_data.privacy.pseudonyms import KEY_FILE_NAME
from dflash_train.records.conversation import SPLITS, read_split
from tests.test_data.ingest_runs import pair, prompt, recipe, run


def test_opt_outs_and_retention_come_first_and_are_counted(tmp_path: Path):
    log = tmp_path / "traffic.jsonl"
    lines = [pair(number, f"Item {number}?") for number in range(40)]
    foreign = [pair(n, "Ask me").replace(b'"acme"', b'"globex"') for n in range(50, 53)]
    timeless = pair(60, "When?").replace(b'"created"', b'"made"')
    log.write_bytes(b"\n".join([*lines, *foreign, timeless]))
    config = recipe(
        tmp_path, test_share=0.2, validation_share=0.2, excluded_tenants=["globex"],
        max_age_days=3, retention_date="2026-10-18",
    )  # fmt: skip
    manifest = run(config, log)  # the log starts on 2026-10-14 at 17:46:40, one call an hour
    assert manifest.counts is not None
    assert manifest.counts.dropped["excluded_tenant"] == 3
    assert manifest.counts.dropped["expired"] == 7 + 1
    card = json.loads((config.run_dir / "conversations" / "data_card.json").read_bytes())
    assert (card["privacy"]["opted_out"], card["privacy"]["expired"]) == (3, 8)
    kept = [r for s in SPLITS for r in read_split(config.run_dir / "conversations", s)]
    assert min(record.ts or "" for record in kept) >= "2026-10-15T00:00:00Z"
    assert len({record.tenant for record in kept}) == 1


def test_calls_left_out_on_purpose_neither_stop_a_run_nor_hide_a_broken_log(tmp_path: Path):
    log = tmp_path / "traffic.jsonl"
    own = [pair(number, f"Item {number}?") for number in range(40)]
    foreign = [pair(n, "Ask me").replace(b'"acme"', b'"globex"') for n in range(100, 300)]
    log.write_bytes(b"\n".join([*own, *foreign]))
    config = recipe(tmp_path, test_share=0.02, validation_share=0.02, excluded_tenants=["globex"])
    counts = run(config, log).counts
    assert counts is not None
    assert (counts.kept, counts.dropped["excluded_tenant"]) == (40, 200)
    log.write_bytes(b"\n".join([*own, *foreign, *[b"{"] * 60]))
    with pytest.raises(ValueError, match="loses 60 of 100 calls as unparsable"):
        run(recipe(tmp_path / "broken", excluded_tenants=["globex"]), log)


def test_the_test_window_says_what_was_seen_in_training(tmp_path: Path):
    log = tmp_path / "traffic.jsonl"
    texts = [f"Item {n} is wanted by somebody who is number {n * 7919}" for n in range(40)]
    texts[38] = texts[2]
    log.write_bytes(b"\n".join(pair(number, text) for number, text in enumerate(texts)))
    config = recipe(tmp_path, test_share=0.2, validation_share=0.2)
    run(config, log)
    folder = config.run_dir / "conversations"
    tests = {record.messages[0].content: record for record in read_split(folder, "test")}
    assert tests[texts[38]].seen_in_train is True
    assert tests[texts[38]].cluster is not None
    assert [r.seen_in_train for r in tests.values()].count(False) == len(tests) - 1
    assert {record.seen_in_train for record in read_split(folder, "train")} == {None}


def test_training_calls_that_hold_an_evaluation_prompt_are_dropped(tmp_path: Path):
    leaked = (
        "Write a function that takes a list of whole numbers and gives back the largest of them"
    )
    log = tmp_path / "traffic.jsonl"
    lines = [
        pair(number, leaked if number in (2, 19) else f"Item {number}?") for number in range(20)
    ]
    lines.append(pair(2, leaked, "And the smallest?"))
    log.write_bytes(b"\n".join(lines))
    config = recipe(tmp_path, test_share=0.2, validation_share=0.2)
    manifest = run(config, log, tasks=[prompt(leaked.upper())])
    assert manifest.counts is not None
    assert manifest.counts.dropped["contaminated"] == 2
    assert manifest.details["contaminated"] == {"tasks": 2}
    tests = read_split(config.run_dir / "conversations", "test")
    assert any(record.messages[0].content == leaked for record in tests)


def test_turn_whose_earlier_answer_nobody_can_write_is_dropped(tmp_path: Path):
    log = tmp_path / "traffic.jsonl"
    lines = [pair(number, f"Item {number}?") for number in range(20)]
    lines += [pair(3, "Item 3?", "And now?"), pair(5, "Lost opener", "And now?")]
    log.write_bytes(b"\n".join(lines))
    manifest = run(recipe(tmp_path, test_share=0.2, validation_share=0.2), log)
    assert manifest.counts is not None
    assert (manifest.counts.read, manifest.counts.kept) == (22, 21)
    assert manifest.counts.dropped["content_missing"] == 1


def test_hmac_key_comes_from_the_file_then_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    log = tmp_path / "traffic.jsonl"
    log.write_bytes(b"\n".join(pair(number, f"Item {number}?") for number in range(20)))

    def tenant(**data: object) -> str | None:
        config = recipe(tmp_path, test_share=0.2, validation_share=0.2, **data)
        run(config, log)
        return next(iter(read_split(config.run_dir / "conversations", "train"))).tenant

    (tmp_path / "key").write_text("a key of more than sixteen bytes\n")
    from_file = tenant(hmac_key_file=str(tmp_path / "key"))
    monkeypatch.setenv("DFLASH_HMAC_KEY", "a key of more than sixteen bytes")
    assert tenant() == from_file
    monkeypatch.setenv("DFLASH_HMAC_KEY", "another key, just as long")
    assert tenant() != from_file
    assert not (tmp_path / "run" / KEY_FILE_NAME).exists()
    monkeypatch.setenv("DFLASH_HMAC_KEY", "short")
    with pytest.raises(ValueError, match="DFLASH_HMAC_KEY holds 5 bytes"):
        tenant()
    with pytest.raises(ValueError, match=r"data\.hmac_key_file \(=.*missing\) cannot be read"):
        tenant(hmac_key_file=str(tmp_path / "missing"))


SECRET_LINE = b'{"request": {"messages": "ana@example.org'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"\n\n", "holds no line"),
        ("junk.jsonl", SECRET_LINE, "holds no line of a known format"),
        ("failed.jsonl", pair(1, "x", error={"code": 1}), "no usable line .1 calls read, dropped:"),
        ("dump.pkl", b"\x80\x04", r"data\.logs"),
        ("torn.jsonl.gz", gzip.compress(pair(1, "x") * 50, mtime=0)[:60], "holds no line"),
        ("fake.jsonl.gz", b"not gzip", "holds no line of a known format"),
        ("one.jsonl", pair(1, "x"), r"data\..* leave no record for the split"),
        ("lossy.jsonl", pair(1, "x") + b"\n" + b"{\n" * 3, r"loses 3 of 4 calls as unparsable"),
    ],
)
def test_bad_log_is_refused_in_a_sentence_and_leaves_nothing(
    tmp_path: Path, name: str, content: bytes, message: str
):
    logs = tmp_path / name
    logs.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        run(recipe(tmp_path / "runs"), logs)
    assert "data." in str(caught.value)
    assert "example.org" not in str(caught.value)
    left = [path.name for path in (tmp_path / "runs").glob("*/*")]
    assert set(left) <= {KEY_FILE_NAME}


def test_missing_log_and_empty_folder_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.logs \(=.*nowhere\) holds or matches no"):
        run(recipe(tmp_path / "runs"), tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="holds or matches no log file"):
        run(recipe(tmp_path / "runs"), tmp_path / "folder")
