import gzip
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from dflash_data.adapters import ADAPTERS
from dflash_data.drops import DropReason
from dflash_data.explode import missing_answers, prefix_key
from dflash_data.ingest import ingest
from dflash_data.pseudonyms import KEY_FILE_NAME
from dflash_data.sample_traffic import write_sample_traffic
from dflash_train.config import DataConfig, RecipeConfig
from dflash_train.records.conversation import SPLITS, Conversation, Turn, read_split
from dflash_train.records.manifest import Manifest

PRIVATE = ["ana@example.org", "+1 202-555-0143", "203.0.113.9", "ghp_" + "a1B2c3" * 6]


def recipe(folder: Path, **data: object) -> RecipeConfig:
    return RecipeConfig(name="run", runs_dir=str(folder), data=DataConfig(**data))  # type: ignore[arg-type]


def run(config: RecipeConfig, logs: Path, **evaluation: list[Conversation]) -> Manifest:
    manifest = Manifest(stage="ingest", recipe_hash="sha256:0", inputs={"logs": "sha256:1"})
    return ingest(config, logs, evaluation=evaluation, manifest=manifest)


def prompt(text: str) -> Conversation:
    return Conversation(id="sha256:e", source="set", messages=[Turn(role="user", content=text)])


def pair(number: int, *user: str, **envelope: object) -> bytes:
    messages: list[dict[str, str | None]] = []
    for text in user:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": None}]
    request = {"messages": messages[:-1], "user": "acme", "metadata": {"session_id": f"s{number}"}}
    fields = {"id": f"r{number}-{len(user)}", "created": 1_792_000_000 + 3600 * number + len(user)}
    return json.dumps({**fields, "request": request, "response": None, **envelope}).encode()


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def plain(content: bytes) -> bytes:
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    log = tmp_path_factory.mktemp("fleet") / "traffic.jsonl"
    write_sample_traffic(log, seed=0, num_requests=250)
    return log


@pytest.fixture(scope="module")
def finished(
    fleet: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RecipeConfig, Manifest]:
    config = recipe(tmp_path_factory.mktemp("runs"))
    return config, run(config, fleet, humaneval=[prompt("def answer():")])


def test_books_balance_and_name_every_reason(fleet: Path, finished: tuple[RecipeConfig, Manifest]):
    config, manifest = finished
    folder = config.run_dir / "conversations"
    counts = manifest.counts
    assert counts is not None
    assert counts.read == len(fleet.read_bytes().splitlines())
    assert list(counts.dropped) == [reason.value for reason in DropReason]
    written = {split: list(read_split(folder, split)) for split in SPLITS}
    assert counts.kept == sum(map(len, written.values()))
    weights = sum(record.weight for records in written.values() for record in records)
    assert weights - counts.kept == manifest.details["merged_repeats"] > 0
    for reason in ("unparsable", "not_success", "duplicate"):
        assert counts.dropped[reason] > 0
    assert weights == 250 - counts.dropped["straddles_cut"]
    manifest.verify_outputs(folder)
    assert Manifest.read(folder) == manifest


def test_no_session_is_divided_and_no_training_call_is_newer_than_a_test_call(
    finished: tuple[RecipeConfig, Manifest],
):
    folder = finished[0].run_dir / "conversations"
    sessions = defaultdict(set)
    times = defaultdict(list)
    for split in SPLITS:
        for record in read_split(folder, split):
            assert record.split == split
            sessions[record.session].add(split)
            times[split].append(record.ts)
    assert all(len(splits) == 1 for splits in sessions.values())
    assert max(times["train"]) < min(times["validation"])
    assert max(times["validation"]) < min(times["test"])
    assert all(times[split] == sorted(times[split]) for split in SPLITS)


def test_every_open_answer_of_a_history_has_its_own_record(finished: tuple[RecipeConfig, Manifest]):
    folder = finished[0].run_dir / "conversations"
    num_open = 0
    for split in SPLITS:
        records = list(read_split(folder, split))
        prompts = {(record.session, prefix_key(record.prompt, record)) for record in records}
        for record in records:
            assert record.answer is None
            assert len(missing_answers(record)) == record.turn
            for index in missing_answers(record):
                num_open += 1
                assert (record.session, prefix_key(record.messages[:index], record)) in prompts
    assert num_open > 20


def test_evaluation_prompts_are_written_beside_the_splits(finished: tuple[RecipeConfig, Manifest]):
    config, manifest = finished
    (written,) = read_split(config.run_dir / "conversations", "eval-humaneval")
    assert (written.split, written.messages[0].content) == ("eval-humaneval", "def answer():")
    assert {entry.path: entry.rows for entry in manifest.outputs}[
        "eval-humaneval-00000.jsonl.gz"
    ] == 1


def test_nothing_private_reaches_any_file(tmp_path: Path):
    log = tmp_path / "traffic.jsonl"
    lines = [pair(number, f"Item {number}?") for number in range(20)]
    lines += [
        pair(number, f"My number {number} is {PRIVATE[number % 4]}.") for number in range(20, 40)
    ]
    lines += [b'{"broken ' + value.encode() for value in PRIVATE]
    lines += [pair(50, PRIVATE[0], error={"message": PRIVATE[1]})]
    log.write_bytes(b"\n".join(lines))
    config = recipe(tmp_path / "runs", test_share=0.2, validation_share=0.2)
    manifest = run(config, log)
    assert manifest.details["privacy"]["redactions"] == {
        "EMAIL/user": 5, "PHONE/user": 5, "IPV4/user": 5, "GITHUB_KEY/user": 5,
    }  # fmt: skip
    assert manifest.details["privacy"]["records_touched"] == 20
    key = (config.run_dir / KEY_FILE_NAME).read_bytes()
    for name, content in files_of(tmp_path / "runs").items():
        for value in [*(text.encode() for text in PRIVATE), b"acme", b'"s2']:
            assert value not in plain(content), f"{value!r} is in {name}"
        assert name.endswith(KEY_FILE_NAME) or key not in plain(content), f"the key is in {name}"
    assert (config.run_dir / KEY_FILE_NAME).stat().st_mode & 0o777 == 0o600


def test_no_content_is_printed_when_a_step_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    log = tmp_path / "traffic.jsonl"
    log.write_bytes(
        b"\n".join(pair(number, f"Ask {PRIVATE[0]} of {number}") for number in range(20))
    )
    monkeypatch.setitem(ADAPTERS, "openai", lambda line, _: line / 0)  # type: ignore[operator]
    with pytest.raises(TypeError):
        run(recipe(tmp_path / "runs"), log)
    captured = capfd.readouterr()
    assert PRIVATE[0] not in captured.out + captured.err
    for name, content in files_of(tmp_path / "runs").items():
        assert PRIVATE[0].encode() not in plain(content), name
    assert not (tmp_path / "runs" / "run" / "conversations").exists()


def test_second_run_and_a_run_after_a_kill_give_the_same_bytes(
    fleet: Path, finished: tuple[RecipeConfig, Manifest], tmp_path: Path
):
    first = files_of(finished[0].run_dir / "conversations")
    config = recipe(tmp_path)
    config.run_dir.mkdir()
    shutil.copy(finished[0].run_dir / KEY_FILE_NAME, config.run_dir / KEY_FILE_NAME)
    child = os.fork()
    if child == 0:  # dies as by kill -9, with the pipeline finished and nothing renamed
        Manifest.write = lambda *_: os._exit(9)  # type: ignore[method-assign]
        run(config, fleet, humaneval=[prompt("def answer():")])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (config.run_dir / "conversations").exists()
    assert any(path.name.startswith(".partial-") for path in config.run_dir.iterdir())
    for _ in range(2):
        run(config, fleet, humaneval=[prompt("def answer():")])
        assert files_of(config.run_dir / "conversations") == first


def test_split_into_files_and_compressed_the_log_gives_the_same_conversations(
    fleet: Path, finished: tuple[RecipeConfig, Manifest], tmp_path: Path
):
    lines = fleet.read_bytes().splitlines(keepends=True)
    logs = tmp_path / "logs"
    logs.mkdir()
    with gzip.open(logs / "b.jsonl.gz", "wb") as stream:
        stream.writelines(lines[:100])
    (logs / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(lines[100:]) + b"\n\n")
    config = recipe(tmp_path)
    config.run_dir.mkdir()
    shutil.copy(finished[0].run_dir / KEY_FILE_NAME, config.run_dir / KEY_FILE_NAME)
    whole = files_of(finished[0].run_dir / "conversations")
    for pattern in (logs, logs / "*.jsonl*"):
        run(config, pattern)
        parts = files_of(config.run_dir / "conversations")
        for split in SPLITS:
            assert parts[f"{split}-00000.jsonl.gz"] == whole[f"{split}-00000.jsonl.gz"]


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
        ("empty.jsonl", b"\n\n", r"has no usable line \(0 calls read, dropped: none\)"),
        ("junk.jsonl", SECRET_LINE, r"has no usable line \(1 calls read, dropped: unparsable 1\)"),
        ("dump.pkl", b"\x80\x04", "is not a .jsonl, .jsonl.gz or .json file. Pickles"),
        ("torn.jsonl.gz", gzip.compress(pair(1, "x") * 50)[:60], "cannot be read to its end"),
        ("fake.jsonl.gz", b"not gzip", "cannot be read to its end"),
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
    assert set(left) <= {KEY_FILE_NAME, "logs"}


def test_missing_log_and_empty_folder_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.logs \(=.*nowhere\) does not exist"):
        run(recipe(tmp_path / "runs"), tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="holds no "):
        run(recipe(tmp_path / "runs"), tmp_path / "folder")
