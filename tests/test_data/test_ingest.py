import gzip
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
from dflash_data.ingest.stage import plan_ingest
from dflash_data.ingest.steps import Step, phases
from dflash_data.logs.sources import LogPart, plan_parts, read_part
from dflash_data.privacy.pseudonyms import KEY_FILE_NAME
from dflash_data.sample_traffic.fleet import write_sample_traffic
from dflash_train.config import RecipeConfig
from dflash_train.records.conversation import SPLITS, read_split
from dflash_train.records.manifest import Manifest
from tests.test_data.ingest_runs import files_of, pair, prompt, recipe, run

PRIVATE = ["ana@example.org", "+1 202-555-0143", "203.0.113.9", "ghp_" + "a1B2c3" * 6]


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
