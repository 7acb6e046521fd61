import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from dflash_data.served.calls import ROWS_FOLDER, read_calls
from dflash_data.served.pages import READINGS_FILE, poll_server, read_saved_pages
from dflash_data.served.prometheus import read_page
from dflash_train.config import DataConfig, DriftConfig, RecipeConfig, UnavailableError
from dflash_train.records.served import ServedRows
from tests.test_data.log_files import write

BEGIN = 1_792_000_800


def call(number: int, *, tenant: str = "west", steps: int = 10, accepted: int = 11) -> bytes:
    """A pair as vLLM answers with `--per-request-spec-decode-metrics summary`."""
    told = {"num_spec_steps": steps, "num_accepted_draft_tokens": accepted}
    return orjson.dumps(
        {
            "id": f"req-{number}",
            "created": BEGIN + number,
            "request": {
                "model": "m",
                "user": tenant,
                "temperature": 0.5,
                "messages": [
                    {"role": "system", "content": f"Secret rule of {tenant}."},
                    {"role": "user", "content": "Is bay 4 free?"},
                ],
            },
            "response": {
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "Yes."},
                        "finish_reason": "stop",
                    }
                ],
                "usage": {"prompt_tokens": 140, "completion_tokens": steps + accepted + 1},
                "metrics": {"speculative_decoding": told},
            },
        }
    )


def log_of(*lines: bytes) -> bytes:
    return b"\n".join(lines) + b"\n"


def config_of(folder: Path, **data: Any) -> RecipeConfig:
    return RecipeConfig(name="watched", runs_dir=str(folder / "runs"), data=DataConfig(**data))


def read(folder: Path, logs: Path, **data: Any) -> ServedRows:
    return read_calls(config_of(folder, **data), str(logs), folder / "drift")


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_a_log_gives_steps_and_tokens_of_each_call_and_counts_dirty_lines(
    tmp_path: Path, packing: str
):
    content = log_of(call(1), b"{broken", b"\xff\xfe not text", call(0, steps=20, accepted=41))
    logs = write(tmp_path / f"logs/calls.jsonl{packing}", content)
    served = read(tmp_path, logs)
    assert served.rows["steps"].tolist() == [20, 10]  # in order of time
    assert served.rows["tokens"].tolist() == [61, 21]
    assert served.rows["prompt_tokens"].tolist() == [140, 140]
    assert (served.read, served.dropped) == (4, {"unparsable": 2})


def test_calls_that_tell_nothing_about_drafts_are_counted_by_reason(tmp_path: Path):
    silent = orjson.loads(call(1))
    del silent["response"]["metrics"]
    countless = orjson.loads(call(2))
    del countless["response"]["usage"]
    undrafted = orjson.loads(call(3, steps=0, accepted=0))
    lines = (orjson.dumps(each) for each in (silent, countless, undrafted))
    served = read(tmp_path, write(tmp_path / "calls.jsonl", log_of(*lines, call(4))))
    assert len(served.rows) == 1
    assert served.dropped == {"no_acceptance": 2, "no_token_count": 1}


def test_no_name_and_no_text_reaches_the_disk(tmp_path: Path):
    logs = write(tmp_path / "calls.jsonl", log_of(call(0, tenant="acme-gmbh")))
    served = read(tmp_path, logs)
    (kept,) = (tmp_path / "drift" / ROWS_FOLDER).iterdir()
    with np.load(kept) as arrays:
        content = b"".join(arrays[name].tobytes() for name in arrays.files)
    for word in (b"acme", b"Secret", b"bay 4", b"req-0"):
        assert word not in content
    assert served.tenants[0].startswith("h:")


def test_customers_who_opted_out_are_left_out(tmp_path: Path):
    logs = write(tmp_path / "calls.jsonl", log_of(call(0), call(1, tenant="shy")))
    served = read(tmp_path, logs, excluded_tenants=["shy"])
    assert served.dropped == {"excluded_tenant": 1}
    assert len(served.tenants) == 1


def test_a_part_that_was_read_is_not_read_again_and_a_changed_one_is(tmp_path: Path):
    write(tmp_path / "logs/a.jsonl", log_of(call(0)))
    first = read(tmp_path, tmp_path / "logs")
    (kept,) = (tmp_path / "drift" / ROWS_FOLDER).iterdir()
    forged = ServedRows(rows=first.rows[:0], tenants=[], read=7)
    forged.write(kept)
    assert read(tmp_path, tmp_path / "logs").read == 7  # taken from the file
    kept.write_bytes(b"cut off")
    assert read(tmp_path, tmp_path / "logs").read == 1  # damaged, so made anew
    write(tmp_path / "logs/a.jsonl", log_of(call(0), call(1)))
    assert read(tmp_path, tmp_path / "logs").read == 2
    assert len(list((tmp_path / "drift" / ROWS_FOLDER).iterdir())) == 1


def test_a_call_in_two_exports_counts_once(tmp_path: Path):
    write(tmp_path / "logs/a.jsonl", log_of(call(0), call(1)))
    write(tmp_path / "logs/b.jsonl", log_of(call(1), call(2)))
    served = read(tmp_path, tmp_path / "logs")
    assert served.rows["moment"].tolist() == [BEGIN, BEGIN + 1, BEGIN + 2]
    assert served.dropped == {"duplicate": 1}


def test_the_first_token_of_sglang_belongs_to_no_step(tmp_path: Path):
    event = {
        "timestamp": "2026-10-14T08:43:20",
        "event": "request.finished",
        "rid": "q-1",
        "obj": {"text": "Is bay 4 free?", "sampling_params": {}},
        "out": {
            "text": "Yes.",
            "meta_info": {
                "finish_reason": {"type": "stop"},
                "prompt_tokens": 11,
                "completion_tokens": 49,
                "spec_accept_length": 2.45,  # 49 tokens in 20 steps
            },
        },
    }
    (row,) = read(tmp_path, write(tmp_path / "s.jsonl", orjson.dumps(event) + b"\n")).rows
    assert (row["tokens"], row["steps"]) == (48, pytest.approx(20))


def test_a_server_log_of_vllm_gives_its_intervals(tmp_path: Path):
    said = (
        "INFO 09-16 05:26:57 [metrics.py:120] SpecDecoding metrics: Mean acceptance length: 2.50, "
        "Accepted throughput: 9.00 tokens/s, Drafted throughput: 18.00 tokens/s, Accepted: 90 "
        "tokens, Drafted: 180 tokens, Per-position acceptance rate: 0.800, 0.500, 0.200, Avg Draft "
        "acceptance rate: 50.0%"
    )
    other = "INFO 09-16 05:26:58 [loggers.py:1] Engine 000: Avg prompt throughput: 1.0 tokens/s"
    cut = said[:90]
    logs = write(tmp_path / "server.log", log_of(*(s.encode() for s in (said, other, cut))))
    served = read(tmp_path, logs)
    assert served.unit == "intervals"
    assert (served.rows["steps"].tolist(), served.rows["tokens"].tolist()) == ([60], [150])
    assert served.accepted_at is not None
    assert served.accepted_at.tolist() == [[48, 30, 12]]
    assert served.dropped["unparsable"] == 1


# Pages of counters


def page(drafts: int, accepted: int, *, decode_s: float = 0.0, engine: int = 0) -> str:
    labels = f'engine="{engine}",model_name="m"'
    return "\n".join(
        [
            "# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.",
            "# TYPE vllm:spec_decode_num_drafts_total counter",
            f"vllm:spec_decode_num_drafts_total{{{labels}}} {float(drafts)}",
            f"vllm:spec_decode_num_draft_tokens_total{{{labels}}} {drafts * 3}",
            f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}} {accepted:e}",
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="1"}} 4',
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="0"}} {drafts}',
            f'vllm:request_decode_time_seconds_bucket{{{labels},le="+Inf"}} 3',
            f"vllm:request_decode_time_seconds_sum{{{labels}}} {decode_s}",
            "",
        ]
    )


def saved(folder: Path, *pages: str) -> str:
    for number, text in enumerate(pages):
        write(folder / f"page-{number:03}.prom", text.encode())
    return str(folder / "*.prom")


def test_intervals_between_pages_are_differences_and_a_restart_counts_from_zero(tmp_path: Path):
    pages = (page(100, 150), page(160, 270, decode_s=2.0), page(160, 270), page(30, 30, decode_s=1))
    served = read_saved_pages([saved(tmp_path, *pages)])
    assert served.rows["steps"].tolist() == [60, 30]
    assert served.rows["tokens"].tolist() == [180, 60]
    assert served.rows["decode_s"].tolist() == [2, 1]
    assert served.accepted_at is not None
    assert served.accepted_at.tolist() == [[60, 0], [30, 4]]
    assert served.dropped["idle_interval"] == 1
    assert served.tenants == ["m engine 0"]


def test_engines_and_servers_are_never_subtracted_from_each_other(tmp_path: Path):
    first = saved(tmp_path / "a", page(10, 10) + page(5, 5, engine=1), page(20, 30))
    second = saved(tmp_path / "b", page(1000, 1000), page(1010, 1005))
    served = read_saved_pages([first, second])
    found = dict(zip(served.tenants, served.rows["tokens"].tolist(), strict=True))
    assert found == {"server 1 m engine 0": 30, "server 2 m engine 0": 15}


def test_dirty_lines_of_a_page_are_counted_and_the_rest_is_read():
    text = page(7, 9) + "vllm:spec_decode_num_drafts_total{engine=\nnonsense\nx{} NaN\n"
    found = read_page(text + 'sglang:spec_accept_rate{model_name="a\\"b"} 0.5 1792000800123\n')
    assert found.engines["m engine 0"].drafts == 7
    assert found.num_unreadable == 2
    stamped = read_page("vllm:spec_decode_num_drafts_total 5 1792000800500\n")
    assert stamped.moment == BEGIN + 0.5


def test_the_gauge_of_sglang_stands_for_the_tokens_since_the_page_before(tmp_path: Path):
    def sglang(tokens: int, length: float) -> str:
        return (
            f'sglang:generation_tokens_total{{model_name="m"}} {tokens}\n'
            f'sglang:spec_accept_length{{model_name="m",tp_rank="0"}} {length}\n'
            f'sglang:spec_accept_length{{model_name="m",tp_rank="1"}} 0.0\n'
        )

    served = read_saved_pages([saved(tmp_path, sglang(100, 2.0), sglang(400, 2.5))])
    assert (served.rows["tokens"].tolist(), served.rows["steps"].tolist()) == ([300], [120])


@contextmanager
def server_of(pages: list[str]) -> Iterator[str]:
    """A server that shows one page after the other, the last one again."""
    shown = iter(pages)
    last = [pages[-1]]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = next(shown, last[0]).encode()
            self.send_response(200 if body else 503)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/metrics"
        server.shutdown()
        thread.join()


def test_a_polled_server_is_remembered_from_call_to_call(tmp_path: Path):
    with server_of([page(10, 10), "", page(20, 30), page(50, 60)]) as url:
        asked = DriftConfig(metrics_url=url, polls=3, poll_s=0.01)
        assert len(poll_server(asked, tmp_path).rows) == 1  # one of three answers failed
        with (tmp_path / READINGS_FILE).open("ab") as stream:
            stream.write(b'{"moment": 3, "cut off')
        served = poll_server(DriftConfig(metrics_url=url), tmp_path)
    assert served.rows["steps"].tolist() == [10, 30]
    assert served.dropped["unparsable"] == 1
    assert (np.diff(served.rows["moment"]) > 0).all()


def test_a_server_that_is_not_there_or_tells_nothing_is_said_so(tmp_path: Path):
    with server_of(["process_start_time_seconds 3\n"]) as url:
        with pytest.raises(ValueError, match="shows no counts of speculative decoding"):
            poll_server(DriftConfig(metrics_url=url), tmp_path)
        gone = url
    with pytest.raises(UnavailableError, match="did not answer"):
        poll_server(DriftConfig(metrics_url=gone), tmp_path)
    with pytest.raises(ValueError, match="is no address"):
        poll_server(DriftConfig(metrics_url="localhost:8000/metrics"), tmp_path)
    with pytest.raises(ValueError, match="matches no file"):
        read_saved_pages([str(tmp_path / "none*.prom")])
