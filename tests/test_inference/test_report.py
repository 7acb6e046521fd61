import re
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import orjson
import pytest

from dflash_inference.findings import Findings
from dflash_inference.report import read_findings, report, summary_lines, write_sentences
from dflash_inference.report_file import check_schema, read_schema
from dflash_inference.report_tables import report_tables
from dflash_inference.statistics import RequestSums, pooled_mean
from dflash_inference.trace import read_traces
from dflash_train.config import RecipeConfig, TrackingConfig, WandbMode
from dflash_train.records.conversation import read_shard, write_shard
from dflash_train.records.manifest import Manifest
from dflash_train.stages import work
from dflash_train.stages.workshop import Workshop


@pytest.fixture(scope="module")
def folder(invented_run: RecipeConfig) -> Path:
    report(invented_run, manifest=Manifest(stage="report", recipe_hash="sha256:0"))
    return invented_run.run_dir / "report"


@pytest.fixture
def findings(folder: Path) -> Findings:
    return orjson.loads((folder / "report.json").read_bytes())


class Page(HTMLParser):
    """Collects whatever a browser would fetch, and checks that elements close in order."""

    VOID = frozenset({"meta", "path", "use", "rect", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")
        ]
        assert tag not in ("script", "link", "img", "iframe")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_is_well_formed_and_fetches_nothing(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    page = Page()
    page.feed(html)
    assert page.open == []
    assert all(reference.startswith("#") for reference in page.references)
    assert "http" not in html
    assert re.findall(r"url\((?!#)", html) == []
    assert html.count("<svg") == 5


def test_top_level_holds_what_programs_look_for(findings: Findings) -> None:
    headline = findings["acceptance_length"]
    assert {"pooled", "per_request", "interval", "block_size", "num_requests"} <= set(headline)
    assert headline["interval"][0] < headline["pooled"] < headline["interval"][1]
    assert headline["block_size"] == 8
    assert set(findings["tokens_per_second"]) == {"plain", "speculative"}
    assert findings["token_match_rate"] == pytest.approx((11 + 17 / 48) / 12)
    assert findings["target"]["name"] == "invented"
    assert findings["checkpoint"]["folder"].endswith("checkpoint/best")
    assert findings["machine"]["cores"] == 2


def test_figures_are_those_of_the_traces(invented_run: RecipeConfig, findings: Findings) -> None:
    traces = invented_run.run_dir / "traces"
    replayed = read_traces(traces / "replay-test.jsonl")
    assert findings["acceptance_length"]["pooled"] == pytest.approx(
        pooled_mean(RequestSums.of(replayed))
    )
    assert [each["acceptance_length"]["num_requests"] for each in findings["slices"]] == [
        46,
        28,
        19,
        11,
    ]
    live = read_traces(traces / "live.jsonl")
    tokens = sum(len(trace.output_ids) - 1 for trace in live)
    seconds = sum(trace.decode_s for trace in live)
    assert findings["tokens_per_second"]["speculative"] == pytest.approx(tokens / seconds)
    assert findings["tokens_per_second"]["plain"] == pytest.approx(1 / 0.031)
    assert findings["speed"]["step_cost"] == pytest.approx(0.041 / 0.031)
    assert sum(findings["steps_by_length"]) == findings["acceptance_length"]["num_steps"]
    assert findings["data"]["splits"][0] == {
        "split": "test",
        "answers": 104,
        "tokens": 104 * 350,
        "answer_tokens": 104 * 60,
    }
    assert findings["data"]["books"][0]["dropped"] == {"malformed": 31, "error": 21}


def test_headline_and_tables_stand_in_all_three_files(folder: Path, findings: Findings) -> None:
    shown = f"{findings['acceptance_length']['pooled']:.2f}"
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text()
        assert shown in text
        assert "tenant 4" in text
        assert "HumanEval" in text
        assert "17.284313" in text
        assert "malformed 31" in text
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "report.html",
        "report.json",
        "report.md",
    ]


def test_every_markdown_table_row_has_the_cells_of_its_head(folder: Path) -> None:
    width = 0
    for line in (folder / "report.md").read_text().splitlines():
        cells = line.count("|") if line.startswith("|") else 0
        assert cells in (0, width) or width == 0
        width = cells


def test_last_lines_give_the_figures_of_the_demo(
    invented_run: RecipeConfig, folder: Path, findings: Findings
) -> None:
    lines = summary_lines(invented_run)
    assert lines[0].startswith(f"acceptance length {findings['acceptance_length']['pooled']:.2f}")
    assert "104 held-out answers" in lines[0]
    text = "\n".join(lines)
    assert "beats prompt lookup" in text
    assert "12 of 12 prompts equal replay at every step" in text
    assert "near-tie of two logits (17.284313 against 17.284309)" in text
    assert "tokens/s speculative" in text


def test_both_views_of_traffic_stand_with_counts_and_intervals(
    invented_run: RecipeConfig, folder: Path, findings: Findings
) -> None:
    views = findings["views"]
    replayed = read_traces(invented_run.run_dir / "traces" / "replay-test.jsonl")
    unseen = [trace for trace in replayed if int(trace.id.rsplit("-", 1)[1]) % 4]
    assert views["traffic"]["acceptance_length"] == findings["acceptance_length"]
    found = views["unseen"]["acceptance_length"]
    assert found["pooled"] == pytest.approx(pooled_mean(RequestSums.of(unseen)))
    assert found["interval"][0] < found["pooled"] < found["interval"][1]
    assert (views["unseen"]["answers"], views["answers_seen"]) == (77, 27)
    assert [each["unseen"]["num_requests"] for each in findings["slices"]] == [34, 21, 14, 8]
    sentence = (
        "77 answers of 77 sessions without a near-duplicate in training; 27 of 104 answers "
        "resemble training."
    )
    assert sentence in "\n".join(summary_lines(invented_run))
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text()
        assert sentence in text
        assert f"{found['pooled']:.2f}" in text


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (True, "No unseen group: 11 of 11 answers resemble training."),
        (None, "No unseen group: this run does not know which answers resemble its training."),
    ],
)
def test_a_run_without_an_unseen_group_says_so(
    small_run: RecipeConfig, seen: bool | None, words: str
) -> None:
    path = small_run.run_dir / "conversations" / "test-00000.jsonl.gz"
    calls = list(read_shard(path))
    for call in calls:
        call.seen_in_train = seen
    write_shard(path, calls)
    report(small_run, manifest=Manifest(stage="report", recipe_hash="sha256:0"))
    findings = orjson.loads((small_run.run_dir / "report" / "report.json").read_bytes())
    assert findings["views"]["unseen"]["acceptance_length"] is None
    assert findings["slices"][0]["unseen"] is None
    for name in ("report.md", "report.html"):
        assert words in (small_run.run_dir / "report" / name).read_text()


@pytest.mark.parametrize(
    ("value", "interval", "num_requests", "words"),
    [
        (0.2, [0.1, 0.3], 80, "The drafter beats prompt lookup"),
        (-0.2, [-0.3, -0.1], 80, "The drafter does not beat prompt lookup"),
        (0.1, [-0.1, 0.3], 80, "Undecided whether the drafter beats prompt lookup"),
        (0.2, [0.1, 0.3], 49, "49 answers are too few for a claim"),
    ],
)
def test_report_says_plainly_whether_prompt_lookup_is_beaten(
    findings: Findings, value: float, interval: list[float], num_requests: int, words: str
) -> None:
    verdict = "better" if interval[0] > 0 else "worse" if interval[1] < 0 else "undecided"
    findings["prompt_lookup"]["difference"] = {
        "value": value,
        "interval": interval,
        "num_requests": num_requests,
        "verdict": verdict,
    }
    assert words in write_sentences(findings)["prompt_lookup"]


def test_a_mismatch_that_is_no_near_tie_is_called_an_error(findings: Findings) -> None:
    findings["live_check"]["num_near_ties"] = 0
    assert "1 of 1 mismatches are NOT near-ties" in write_sentences(findings)["live_check"]


def test_two_reports_of_one_run_are_the_same_bytes(
    invented_run: RecipeConfig, folder: Path
) -> None:
    names = ("report.json", "report.md", "report.html")
    before = [(folder / name).read_bytes() for name in names]
    report(invented_run, manifest=Manifest(stage="report", recipe_hash="sha256:0"))
    assert [(folder / name).read_bytes() for name in names] == before


def test_a_missing_or_changed_evaluation_is_refused(tmp_path: Path) -> None:
    config = RecipeConfig(name="none", runs_dir=str(tmp_path))
    manifest = Manifest(stage="report", recipe_hash="sha256:0")
    with pytest.raises(ValueError, match="Run the stage `evaluate` first"):
        report(config, manifest=manifest)


@pytest.fixture
def measured_run(small_run: RecipeConfig) -> RecipeConfig:
    """A run whose recipe names a measurement of concurrency and a cost table."""
    points = [
        {"concurrency": n, "plain_tokens_per_s": 30.0 * n, "speculative_tokens_per_s": rate,
         "tokens_per_step": 2.0}
        for n, rate in ((1, 60.0), (16, 400.0))
    ]  # fmt: skip
    rows = [{"batch": 1, "width": 1, "verify_s": 0.01}, {"batch": 1, "width": 8, "verify_s": 0.012}]
    version = {"format_version": 1}
    concurrency = {"format": "dflash-train/concurrency", "setting": "two cores", "points": points}
    costs = {"format": "dflash-train/costs", "hardware": "a faster machine", "rows": rows}
    for name, content in (("concurrency", concurrency), ("costs", costs)):
        (small_run.run_dir / f"{name}.json").write_bytes(orjson.dumps(version | content))
    small_run.evaluate.concurrency = str(small_run.run_dir / "concurrency.json")
    small_run.evaluate.cost_tables = [str(small_run.run_dir / "costs.json")]
    return small_run


def test_measurements_of_other_settings_stand_in_all_three_files(
    measured_run: RecipeConfig,
) -> None:
    report(measured_run, manifest=Manifest(stage="report", recipe_hash="sha256:0"))
    folder = measured_run.run_dir / "report"
    found = orjson.loads((folder / "report.json").read_bytes())
    assert found["concurrency"]["loses_from"] == 16
    (prediction,) = found["predictions"]
    expected = found["acceptance_length"]["pooled"] / 1.2
    assert prediction["batches"][0]["speed_up"] == pytest.approx(expected)
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text()
        assert "loses from 16; break-even near" in text
        assert "a faster machine" in text
        assert f"{expected:.2f}" in text
    html = (folder / "report.html").read_text()
    assert html.count("<svg") == 6
    page = Page()
    page.feed(html)
    assert page.open == []


def test_schema_is_valid_and_asks_for_every_part(
    measured_run: RecipeConfig, findings: Findings
) -> None:
    schema = read_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert set(schema["required"]) == set(schema["properties"]) == set(findings)
    report(measured_run, manifest=Manifest(stage="report", recipe_hash="sha256:0"))
    check_schema(orjson.loads((measured_run.run_dir / "report" / "report.json").read_bytes()))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("acceptance_length.pooled", 0.5),
        ("acceptance_length.interval", [1.0]),
        ("token_match_rate", 1.5),
        ("prompt_lookup.difference.verdict", "fine"),
        ("steps_by_length", [1.5]),
        ("speed.seconds_per_step.draft", "fast"),
        ("requests.test.steps", [-1]),
        ("live_check.colour", "red"),
        ("format_version", 2),
    ],
)
def test_figures_that_break_the_schema_are_not_written(
    findings: Findings, place: str, value: object
) -> None:
    check_schema(findings)
    *parts, last = place.split(".")
    inner = findings
    for part in parts:
        inner = inner[part]
    inner[last] = value
    with pytest.raises(RuntimeError, match=r"breaks its schema at \$"):
        check_schema(findings)


def test_speed_up_is_the_ratio_of_mean_seconds_per_token_of_one_loop(
    invented_run: RecipeConfig, findings: Findings
) -> None:
    traces = invented_run.run_dir / "traces"
    live, width_one = (read_traces(traces / name) for name in ("live.jsonl", "width1.jsonl"))
    means = [
        sum(each.decode_s / (len(each.output_ids) - 1) for each in some) / len(some)
        for some in (width_one, live)
    ]
    speed = findings["speed"]
    assert speed["speed_up"] == pytest.approx(means[0] / means[1])
    assert speed["speed_up_interval"][0] < speed["speed_up"] < speed["speed_up_interval"][1]
    assert speed["seconds_per_plain_token"] == pytest.approx(0.031)
    assert sum(speed["seconds_per_step"].values()) == pytest.approx(0.041)
    assert "12 prompts, too few for a claim" in write_sentences(findings)["speed"]


def test_the_noise_floor_stands_beside_the_match_rate(folder: Path, findings: Findings) -> None:
    check = findings["live_check"]
    assert check["batch_match_rate"] == pytest.approx(11.5 / 12)
    assert check["num_batch_identical"] == 11
    for name in ("report.md", "report.html"):
        assert "plain decoding at 95.83%" in (folder / name).read_text()


def test_tables_hold_the_figures_and_reach_wandb_offline(
    measured_run: RecipeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    measured_run.tracking = TrackingConfig(wandb=True, wandb_mode=WandbMode.offline)
    work.report(Workshop(measured_run), Manifest(stage="report", recipe_hash="sha256:0"))
    found = read_findings(measured_run)
    tables = report_tables(found)
    assert set(tables) == {
        "acceptance_length", "draft_positions", "num_accepted", "speed", "concurrency",
        "predictions",
    }  # fmt: skip
    assert all(len(row) == len(table.columns) for table in tables.values() for row in table.rows)
    first = tables["acceptance_length"].rows[0]
    assert first[:3] == ["traffic", "all", found["acceptance_length"]["pooled"]]
    assert sum(steps for _, steps in tables["num_accepted"].rows) == first[-2]
    ways = {row[0]: row for row in tables["speed"].rows}
    assert ways["prompt_lookup"][2] == pytest.approx(1.25)
    assert sum(ways["width_one"][-3:]) == pytest.approx(31.0)
    wandb.teardown()
    written = list(measured_run.run_dir.glob("wandb/offline-run-*/files/media/table/report/*.json"))
    assert len(written) == len(tables)
    lengths = next(path for path in written if path.name.startswith("acceptance_length"))
    assert orjson.loads(lengths.read_bytes())["data"][0][:2] == ["traffic", "all"]


def test_ways_of_decoding_share_one_measure_and_their_parts_add_up(
    invented_run: RecipeConfig, findings: Findings, folder: Path
) -> None:
    speed = findings["speed"]
    ways, setting = speed["ways"], speed["setting"]
    assert ways["width_one"]["speed_up"] == pytest.approx(1.0)
    assert ways["transformers"]["speed_up"] == pytest.approx(0.031 / 0.029)
    assert ways["prompt_lookup"]["speed_up"] == pytest.approx(1.25)
    assert ways["drafter"]["speed_up"] == speed["speed_up"]
    traces = read_traces(invented_run.run_dir / "traces" / "live.jsonl")
    tokens = sum(len(trace.output_ids) - 1 for trace in traces)
    seconds = sum(trace.decode_s for trace in traces)
    per_token = ways["drafter"]["seconds_per_token"]
    assert sum(per_token.values()) == pytest.approx(seconds / tokens)
    assert per_token["draft"] == pytest.approx(0.2 * seconds / tokens)
    assert ways["drafter"]["wall_seconds"] == pytest.approx(seconds)  # invented without prefill
    assert (setting["mode"], setting["dtype"]) == ("fast", "float32")
    assert (
        "Prompt lookup on the same passes: 1.25 (1.25 to 1.25)."
        in write_sentences(findings)["speed"]
    )
    row = "| prompt lookup | 40.3 | 1.25 (1.25 to 1.25) | 1.00 | 0.00 | 24.80 | 0.00 | 24.80 |"
    assert row in (folder / "report.md").read_text()


def test_an_evaluation_of_an_earlier_version_is_reported_without_prompt_lookup(
    small_run: RecipeConfig,
) -> None:
    traces = small_run.run_dir / "traces"
    (traces / "live_lookup.jsonl").unlink()
    manifest = Manifest.read(traces)
    assert manifest is not None
    manifest.outputs = [each for each in manifest.outputs if each.path != "live_lookup.jsonl"]
    del manifest.details["live_mode"], manifest.details["dtype"]
    manifest.write(traces)
    report(small_run, manifest=Manifest(stage="report", recipe_hash="sha256:0"))
    found = read_findings(small_run)
    assert list(found["speed"]["ways"]) == ["transformers", "width_one", "drafter"]
    assert found["speed"]["setting"]["dtype"] is None
    assert "Prompt lookup was not timed." in write_sentences(found)["speed"]
    check_schema(found)
