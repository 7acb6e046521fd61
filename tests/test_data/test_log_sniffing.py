from pathlib import Path

import orjson
import pytest

from dflash_data.adapters import FORMATS, detect_format
from dflash_data.logs.sources import plan_parts, read_part
from tests.test_data.log_files import lines, pair, write

SAMPLES = {
    "openai": [orjson.dumps(pair(0))],
    "openai_batch": [
        b'{"custom_id":"row-1","method":"POST","url":"/v1/chat/completions",'
        b'"body":{"messages":[{"role":"user","content":"Is bay 4 free?"}]}}',
        b'{"id":"b-1","custom_id":"row-1","response":{"status_code":200,'
        b'"body":{"choices":[{"message":{"role":"assistant","content":"Yes."}}]}},"error":null}',
    ],
    "litellm": [
        b'{"id":"c-1","trace_id":"t-1","call_type":"acompletion","status":"success",'
        b'"cache_hit":false,"model":"small","model_group":"desk","startTime":1792000801.2,'
        b'"messages":[{"role":"user","content":"Is bay 4 free?"}],"response":{"choices":[]},'
        b'"model_parameters":{}}'
    ],
    "langfuse": [
        b'{"id":"o-1","trace_id":"t-1","type":"GENERATION","start_time":"2026-10-14 08:41:10",'
        b'"input":"[{\\"role\\":\\"user\\",\\"content\\":\\"Is bay 4 free?\\"}]","output":"Yes.",'
        b'"provided_model_name":"small","level":"DEFAULT"}'
    ],
    "helicone": [
        b'{"request_id":"r-1","request_created_at":"2026-10-14T08:42:00Z","request_model":"small",'
        b'"request_body":{"messages":[{"role":"user","content":"Is bay 4 free?"}]},'
        b'"response_body":{"choices":[]},"response_status":200}'
    ],
    "vllm_log": [
        b"INFO 10-14 08:40:00 [launcher.py:29] Route: /health, Methods: GET",
        b"INFO  Received request chatcmpl-1: params: SamplingParams(n=1, temperature=0.2), "
        b"lora_request: None.",
        b"DEBUG Request chatcmpl-1 JSON body: "
        b'{"model":"small","messages":[{"role":"user","content":"Is bay 4 free?"}]}',
        b"INFO  Generated response chatcmpl-1: output: 'Yes.', finish_reason: stop",
    ],
    "sglang": [
        b'{"timestamp":"2026-10-14T08:43:20","event":"request.finished","rid":"q-1",'
        b'"obj":{"text":"Is bay 4 free?","sampling_params":{}},"out":{"text":"Yes.",'
        b'"meta_info":{"finish_reason":{"type":"stop"}}}}'
    ],
    "weave": [
        b'{"id":"w-1","project_id":"acme/desk","op_name":"x/op/openai.chat.completions.create:1",'
        b'"trace_id":"t-1","started_at":"2026-10-14T08:44:00Z","exception":null,'
        b'"inputs":{"messages":[{"role":"user","content":"Is bay 4 free?"}]},"output":{}}'
    ],
    "opentelemetry": [
        b'{"traceId":"0af7","spanId":"b9c7","name":"chat small","startTimeUnixNano":"179200090",'
        b'"attributes":[{"key":"gen_ai.operation.name","value":{"stringValue":"chat"}}]}'
    ],
    "sharegpt": [
        b'{"id":"s-1","conversations":[{"from":"human","value":"Is bay 4 free?"},'
        b'{"from":"gpt","value":"Yes."}]}',
        b'{"messages":[{"role":"user","content":"Is bay 4 free?"},'
        b'{"role":"assistant","content":"Yes."}]}',
    ],
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_detected_by_its_own_lines_and_read(tmp_path: Path, name: str):
    assert detect_format(SAMPLES[name]).name == name
    path = write(tmp_path / "calls.jsonl", b"\n".join(SAMPLES[name]))
    (part,) = plan_parts(str(path))
    assert part.format == name
    assert list(read_part(part))
    assert plan_parts(str(path), format=name) == [part]


def test_files_of_all_formats_in_one_folder_are_told_apart(tmp_path: Path):
    for name, sample in SAMPLES.items():
        write(tmp_path / f"{name}.jsonl.gz", b"\n".join(sample))
    parts = plan_parts(str(tmp_path))
    assert {part.slices[0].name.split(".")[0]: part.format for part in parts} == {
        name: name for name in SAMPLES
    }


def test_format_is_found_behind_lines_that_no_format_knows(tmp_path: Path):
    noise = b"INFO starting\n{}\n[1]\n" * 2000
    (part,) = plan_parts(str(write(tmp_path / "a.log", noise + lines(1))))
    assert part.format == "openai"


def test_mixture_of_formats_in_one_file_or_under_one_key_is_refused(tmp_path: Path):
    litellm = SAMPLES["litellm"][0]
    path = write(tmp_path / "calls.jsonl", lines(2) + litellm)
    with pytest.raises(ValueError, match=r"calls\.jsonl.*several formats \(litellm, openai\)"):
        plan_parts(str(path))
    path = write(tmp_path / "calls.jsonl", litellm)
    with pytest.raises(ValueError, match=r"format litellm, but data\.format \(=openai\)"):
        plan_parts(str(path), format="openai")


def test_file_of_a_format_that_joins_lines_is_never_divided(tmp_path: Path):
    form = next(form for form in FORMATS.values() if form.joins_lines and not form.is_request)
    write(tmp_path / "calls.log", b"\n".join(SAMPLES[form.name]))
    assert len(plan_parts(str(tmp_path), part_bytes=10)) == 1
