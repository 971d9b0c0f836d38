"""`manyicl serve` in front of the real vLLM: one server, used as a child (--engine vllm) and by its address (--engine openai).

Skipped without its environment (make vllm-env). What needs no real server is in test_vllm_backend.py and openai_backend/.
"""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from manyicl.engines.native import NativeEngine
from manyicl.modeling import export_model
from manyicl.serving.native_backend import open_native_engine
from manyicl.serving.training_files import shuffle_examples
from manyicl.tasks.task import Example
from serving_fixtures import chat_file, wait_for
from test_serving_guard import Caller
from test_vllm_backend import is_alive
from test_vllm_engine import PYTHON

pytestmark = pytest.mark.slow

CONTEXT_TOKENS = 2048
BLOCK_TOKENS = 128  # What vLLM keeps whole on processors, unless told otherwise.
LABELS = ("bug", "fee", "ask")
PAIRS = [(f"note {number} of the day", LABELS[number % 3]) for number in range(24)]
INPUTS = ["the app crashes", "my invoice", "note 3 of the day"]
# Both compute in bf16 and round in different places. One example less moves a score by up to 0.7, another order by up to 0.25.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Vllm:
    """vLLM's own server as the service started it."""

    process: psutil.Process
    address: str
    key: str

    def read_cached_tokens(self) -> float:
        """Tokens that it has found in its prefix cache so far."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=20) as answer:
            shown = answer.read().decode()
        return sum(float(value) for value in re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", shown, flags=re.MULTILINE))


@dataclass(frozen=True)
class Running:
    """A service in a process of its own."""

    process: subprocess.Popen[bytes]
    call: Caller


@contextmanager
def serve(folder: Path, data_dir: Path, *options: object) -> Iterator[Running]:
    """A service of a model, ready; killed at the end unless it has ended."""
    command = [sys.executable, "-m", "manyicl", "serve", "--model", folder, "--data-dir", data_dir, "--port", "0"]
    command += ["--context", CONTEXT_TOKENS, *options]
    data_dir.mkdir(exist_ok=True)
    log = data_dir / "log"
    with log.open("wb") as stream, subprocess.Popen([str(part) for part in command], stderr=stream) as process:
        try:
            ready = wait_for(
                lambda: re.search(r"ready on (http://[\d.:]+)", log.read_text()) or process.poll() is not None, seconds=600
            )
            assert process.poll() is None, log.read_text()
            yield Running(process, Caller(ready[1]))
        finally:
            process.kill()


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as `manyicl export` writes it; vLLM takes heads of 32 and more on processors."""
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} does not exist: make vllm-env")
    folder = tmp_path_factory.mktemp("vllm") / "exported"
    export_model(tiny_model_folder("llama", head_dim=32), folder)
    return folder


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB.
        patch.setenv("VLLM_CPU_CI_ENV", "1")  # As vLLM has it in its own tests: what it compiles otherwise takes longest.
        with serve(folder, folder.parent / "data", "--engine", "vllm", "--vllm-python", PYTHON) as running:
            yield running


@pytest.fixture(scope="module")
def vllm(service: Running) -> Vllm:
    (process,) = psutil.Process(service.process.pid).children()
    command = process.cmdline()
    address = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    return Vllm(process, address, process.environ()["VLLM_API_KEY"])


@pytest.fixture(scope="module")
def engine(folder: Path) -> NativeEngine:
    return open_native_engine(str(folder), dtype="bfloat16", context_tokens=CONTEXT_TOKENS)


def make_task(call: Caller, name: str, *, labels: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Post the examples, wait for the job, and return the task's facts."""
    status, file, _ = call.upload(chat_file(PAIRS))
    assert status == 200, file
    body = {"training_file": file["id"], "model": "base", "suffix": name} | ({} if labels is None else {"labels": labels})
    status, job, _ = call("POST", "/v1/fine_tuning/jobs", body)
    assert status == 200, job
    done = wait_for(lambda: (found := call("GET", f"/v1/fine_tuning/jobs/{job['id']}")[1])["finished_at"] and found, seconds=120)
    assert done["status"] == "succeeded", done["error"]
    return dict(call("GET", f"/v1/tasks/{name}")[1])


def read_scores(call: Caller, name: str, text: str) -> dict[str, float]:
    """The log-probability of each label."""
    messages = [{"role": "user", "content": text}]
    body = {"model": name, "messages": messages, "logprobs": True, "top_logprobs": len(LABELS)}
    status, answer, _ = call("POST", "/v1/chat/completions", body)
    assert status == 200, answer
    (token,) = answer["choices"][0]["logprobs"]["content"]
    assert answer["choices"][0]["message"]["content"] == token["token"]
    return {top["token"]: top["logprob"] for top in token["top_logprobs"]}


def expected_scores(engine: NativeEngine, num_added: int = 0) -> list[dict[str, float]]:
    """What the native engine scores the labels after the examples, in the order in which the service puts them."""
    examples = [Example(*pair) for pair in PAIRS]
    added = [Example(f"a new note {number}", LABELS[number]) for number in range(num_added)]
    prefix = engine.prefill([*shuffle_examples(examples, seed=0), *added])
    scores = engine.choose(prefix, INPUTS, [LABELS] * len(INPUTS))
    return [dict(zip(LABELS, own.tolist(), strict=True)) for own in scores]


def test_scores_are_those_of_the_native_engine_and_the_examples_are_computed_once(
    service: Running, vllm: Vllm, engine: NativeEngine
) -> None:
    call = service.call
    facts = make_task(call, "labelled")
    assert (facts["num_shots"], facts["computed_tokens"]) == (24, facts["prefix_tokens"])
    whole_blocks = facts["prefix_tokens"] // BLOCK_TOKENS * BLOCK_TOKENS
    assert whole_blocks > BLOCK_TOKENS
    before = vllm.read_cached_tokens()
    scores = [read_scores(call, "labelled", text) for text in INPUTS]
    wait_for(lambda: vllm.read_cached_tokens() - before >= len(INPUTS) * whole_blocks)
    for own, expected in zip(scores, expected_scores(engine), strict=True):
        assert own == pytest.approx(expected, abs=TOLERANCE)
    status, classified, _ = call("POST", "/v1/classify", {"model": "labelled", "input": INPUTS})
    assert status == 200, classified
    for own, entry in zip(scores, classified["data"], strict=True):
        assert sum(entry["probabilities"].values()) == pytest.approx(1)
        assert entry["label"] == max(own, key=lambda label: entry["probabilities"][label])
        assert entry["num_shots"] == 24
    assert classified["usage"]["prompt_tokens_details"]["cached_tokens"] == 3 * facts["prefix_tokens"]

    # Three more examples: only what follows the whole blocks of the others is computed.
    new = [{"input": f"a new note {number}", "answer": LABELS[number]} for number in range(3)]
    status, longer, _ = call("POST", "/v1/tasks/labelled/examples", {"examples": new, "after": 24})
    assert (status, longer["num_shots"]) == (200, 27)
    assert longer["computed_tokens"] - facts["computed_tokens"] == longer["prefix_tokens"] - whole_blocks
    for text, expected in zip(INPUTS, expected_scores(engine, 3), strict=True):
        assert read_scores(call, "labelled", text) == pytest.approx(expected, abs=TOLERANCE)


def test_free_text_is_written_whole_and_as_a_stream_with_the_tokens_that_vllm_tells(service: Running) -> None:
    call = service.call
    facts = make_task(call, "written", labels=())
    body = {"model": "written", "messages": [{"role": "user", "content": INPUTS[0]}], "max_tokens": 6}
    status, whole, _ = call("POST", "/v1/chat/completions", body)
    assert status == 200, whole
    assert whole["usage"]["completion_tokens"] <= 6
    cached = whole["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == facts["prefix_tokens"] // BLOCK_TOKENS * BLOCK_TOKENS
    status, stream, _ = call("POST", "/v1/chat/completions", body | {"stream": True})
    events = [line.removeprefix("data: ") for line in stream.decode().splitlines() if line]
    assert (status, events[-1]) == (200, "[DONE]")
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert "".join(choice["delta"]["content"] for choice in choices) == whole["choices"][0]["message"]["content"]
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_the_same_server_is_used_by_its_address_also_after_a_restart(
    folder: Path, service: Running, vllm: Vllm, engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYICL_REMOTE_KEY", vllm.key)
    options = ("--engine", "openai", "--base-url", f"{vllm.address}/v1", "--remote-model", folder.name)
    data_dir = folder.parent / "remote-data"
    with serve(folder, data_dir, *options) as running:
        make_task(running.call, "remote")
        scores = [read_scores(running.call, "remote", text) for text in INPUTS]
        for own, expected in zip(scores, expected_scores(engine), strict=True):
            assert own == pytest.approx(expected, abs=TOLERANCE)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=40) == 0
    assert vllm.process.is_running()
    with serve(folder, data_dir, *options) as running:
        before = vllm.read_cached_tokens()
        for own, text in zip(scores, INPUTS, strict=True):
            assert read_scores(running.call, "remote", text) == pytest.approx(own, abs=TOLERANCE)
        wait_for(lambda: vllm.read_cached_tokens() > before)


def test_a_service_that_is_killed_takes_vllm_with_all_its_processes_along(service: Running, vllm: Vllm) -> None:
    processes = [vllm.process, *vllm.process.children(recursive=True)]
    assert len(processes) > 1
    os.kill(service.process.pid, signal.SIGKILL)
    wait_for(lambda: not [process for process in processes if is_alive(process.pid)], seconds=60)
