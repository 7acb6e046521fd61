import gzip
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest

import dflash_data.ingest.plan
import dflash_data.ingest.stage
import dflash_data.ingest.steps
from dflash_data.drops import Call, DropReason
from dflash_data.ingest.explode import missing_answers, prefix_key
from dflash_data.ingest.partitions import read_lines_of
from dflash_data.ingest.stage import ingest, plan_ingest
from dflash_data.ingest.steps import Step, phases
from dflash_data.logs.sources import LogPart, plan_parts, read_part
from dflash_data.privacy.pseudonyms import KEY_FILE_NAME
from dflash_data.sample_traffic.fleet import write_sample_traffic
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
    removed = manifest.details["merged_repeats"] + manifest.details["removed_by_cap"]
    assert weights - counts.kept == removed > 0
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


@pytest.fixture
def many_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide small logs into many parts and buckets."""
    monkeypatch.setattr(
        dflash_data.ingest.stage, "plan_parts", partial(plan_parts, part_bytes=20_000)
    )
    monkeypatch.setattr(dflash_data.ingest.plan, "BUCKET_BYTES", 20_000)


@pytest.fixture
def stopped_before_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyError("power cut")

    monkeypatch.setattr(dflash_data.ingest.steps, "decide", stop)


def private_log(path: Path) -> None:
    lines = [pair(number, f"Item {number}, " + "please, " * 250) for number in range(20)]
    lines += [
        pair(number, f"My number {number} is {PRIVATE[number % 4]}.") for number in range(20, 40)
    ]
    lines += [b'{"broken ' + value.encode() for value in PRIVATE]
    lines += [pair(50, PRIVATE[0], error={"message": PRIVATE[1]})]
    path.write_bytes(b"\n".join(lines))


def assert_nothing_private_in(folder: Path) -> None:
    files = files_of(folder)
    assert files
    for name, content in files.items():
        for value in [*(text.encode() for text in PRIVATE), b"acme", b'"s2']:
            assert value not in plain(content), f"{value!r} is in {name}"
    for partition in folder.rglob("*.zst"):
        texts = [b"".join(read_lines_of([partition], bucket)) for bucket in range(200)]
        assert any(texts)
        for value in [*(text.encode() for text in PRIVATE), b"acme", b'"s2']:
            assert value not in b"".join(texts), f"{value!r} is in {partition.name}"


def test_nothing_private_reaches_any_file(tmp_path: Path):
    log = tmp_path / "traffic.jsonl"
    private_log(log)
    config = recipe(tmp_path / "runs", test_share=0.2, validation_share=0.2)
    manifest = run(config, log)
    assert manifest.details["privacy"]["redactions"] == {
        "EMAIL/user": 5, "PHONE/user": 5, "IPV4/user": 5, "GITHUB_KEY/user": 5,
    }  # fmt: skip
    assert manifest.details["privacy"]["records_touched"] == 20
    key = (config.run_dir / KEY_FILE_NAME).read_bytes()
    assert_nothing_private_in(tmp_path / "runs")
    for name, content in files_of(tmp_path / "runs").items():
        assert name.endswith(KEY_FILE_NAME) or key not in plain(content), f"the key is in {name}"
    assert (config.run_dir / KEY_FILE_NAME).stat().st_mode & 0o777 == 0o600


def test_tasks_share_one_plan_although_their_steps_are_copied(tmp_path: Path):
    log = tmp_path / "traffic.jsonl"
    private_log(log)
    plan = plan_ingest(recipe(tmp_path / "runs"), plan_parts(str(log)), {})
    copied = deepcopy(phases(plan))
    steps = [step for phase in copied for step in phase.steps if isinstance(step, Step)]
    assert steps
    assert all(step.plan is plan for step in steps)


@pytest.mark.usefixtures("many_tasks", "stopped_before_decisions")
def test_nothing_private_is_in_the_temporary_files_of_any_phase(tmp_path: Path):
    log = tmp_path / "traffic.jsonl"
    private_log(log)
    config = recipe(
        tmp_path / "runs", test_share=0.2, validation_share=0.2, excluded_tenants=["acme & sons"]
    )
    with pytest.raises(RuntimeError, match="KeyError"):
        run(config, log)
    left = set(files_of(config.run_dir))
    for kind in ("parts/00001.zst", "chained/00001.zst", "rows/00001.rows.npy", "executor.json"):
        assert any(name.endswith(kind) for name in left), kind
    assert_nothing_private_in(tmp_path / "runs")
    assert not any(b"& sons" in content for content in files_of(tmp_path / "runs").values())
    key = (config.run_dir / KEY_FILE_NAME).read_bytes()
    for name, content in files_of(config.run_dir).items():
        assert name.endswith(KEY_FILE_NAME) or key not in content, f"the key is in {name}"


def test_no_content_is_printed_when_a_step_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    log = tmp_path / "traffic.jsonl"
    log.write_bytes(b"\n".join(pair(n, f"Ask {PRIVATE[0]} of {n}") for n in range(20)))
    monkeypatch.setattr(
        dflash_data.ingest.steps, "judge", lambda record, _: int(record.messages[0].content)
    )
    with pytest.raises(
        RuntimeError, match="ValueError; the error's own text is withheld"
    ) as caught:
        run(recipe(tmp_path / "runs"), log)
    captured = capfd.readouterr()
    assert PRIVATE[0] not in captured.out + captured.err + str(caught.value)
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
        assert not (config.run_dir / "ingest").exists()


@pytest.mark.usefixtures("many_tasks")
def test_workers_and_order_of_files_do_not_change_a_byte(fleet: Path, tmp_path: Path):
    lines = fleet.read_bytes().splitlines(keepends=True)
    written: list[dict[str, bytes]] = []
    for workers, names in ((1, "abcd"), (3, "dbac")):
        logs = tmp_path / names
        logs.mkdir()
        for place, name in enumerate(names):
            (logs / f"{name}.jsonl").write_bytes(b"".join(lines[place * 70 : place * 70 + 70]))
        config = recipe(tmp_path / f"runs-{workers}")
        config.executor.workers = workers
        config.run_dir.mkdir(parents=True)
        (config.run_dir / KEY_FILE_NAME).write_text("the same key for both of them")
        run(config, logs, humaneval=[prompt("def answer():")])
        written.append(files_of(config.run_dir / "conversations"))
    assert len(written[0]) > 10
    assert written[0] == written[1]


@pytest.mark.usefixtures("many_tasks")
def test_a_failed_task_costs_one_task(fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run_with(folder: str, failing: int | None) -> list[int]:
        """Run once, and give the numbers of the parts that were read."""
        config = recipe(tmp_path / folder)
        config.executor.workers = 1
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / KEY_FILE_NAME).write_text("the same key for both of them")
        num_read: list[int] = []

        def read(part: LogPart) -> Iterator[Call]:
            num_read.append(part.slices[0].start // 20_000)
            if num_read[-1] == failing:
                raise OSError("the disk went away")
            yield from read_part(part)

        monkeypatch.setattr(dflash_data.ingest.steps, "read_part", read)
        if failing is None:
            run(config, fleet)
        else:
            with pytest.raises(RuntimeError, match="OSError"):
                run(config, fleet)
        return num_read

    all_parts = run_with("undisturbed", None)
    assert len(all_parts) > 4
    assert run_with("disturbed", 2) == all_parts[:3]
    assert run_with("disturbed", None) == all_parts[2:]
    assert files_of(tmp_path / "disturbed" / "run" / "conversations") == files_of(
        tmp_path / "undisturbed" / "run" / "conversations"
    )


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
