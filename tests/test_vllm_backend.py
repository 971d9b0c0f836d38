"""vLLM as a child process, here a stand-in under its module's name: started, waited for, used, and ended."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from manyicl.errors import ModelError
from manyicl.serving import vllm_backend
from manyicl.serving.backends import BackendLimits, TaskSpec
from manyicl.serving.vllm_backend import VllmBackend
from manyicl.tasks.task import Example
from serving_fixtures import wait_for
from test_serving_command import served

pytest.importorskip("httpx")

# Completes one prompt after another with nothing; is ready after its second health check.
STAND_IN = """
import json, os, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("process", os.getpid(), "started with", *sys.argv[1:], flush=True)
if "--fail" in sys.argv:
    sys.exit("out of everything")
if "--stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("process", subprocess.Popen(["sleep", "60"]).pid, flush=True)
checks = []

class Handler(BaseHTTPRequestHandler):
    def answer(self, content, status=200):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        if self.path == "/health":
            checks.append(1)
            self.answer({}, 200 if len(checks) > 1 else 503)
        elif self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.answer({}, 401)
        else:
            self.answer({"data": [{"id": arguments["--served-model-name"], "max_model_len": 321}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        usage = {"prompt_tokens": len(body["prompt"]), "prompt_tokens_details": {"cached_tokens": 3}}
        told = {"top_logprobs": [{f"token_id:{token}": -1.0 for token in body.get("logprob_token_ids", [])}]}
        self.answer({"choices": [{"index": 0, "text": "x", "logprobs": told}], "usage": usage})

    def log_message(self, *arguments):
        pass

HTTPServer(("127.0.0.1", int(arguments["--port"])), Handler).serve_forever()
"""
SPEC = TaskSpec("a" * 32, (Example("number 1", "odd"),))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder on the child's path in which vLLM's server is the stand-in."""
    module = tmp_path / "path" / "vllm" / "entrypoints" / "openai" / "api_server.py"
    module.parent.mkdir(parents=True)
    module.write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    return tmp_path


def is_alive(pid):
    """Whether a process runs; one that has ended and that nobody has asked for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def processes(log):
    """Ids of the processes that a stand-in has told."""
    return [int(number) for number in re.findall(r"^process (\d+)", log.read_text(encoding="utf-8"), flags=re.MULTILINE)]


def test_the_server_is_started_used_and_ended(stand_in, tiny_model_folder):
    folder = tiny_model_folder("llama")

    async def scenario():
        backend = VllmBackend(folder, stand_in / "logs" / "vllm.log", options=("--block-size", "32"), limits=BackendLimits())
        await backend.start()
        child = backend._child
        try:
            assert (backend.name, backend.context_tokens) == (folder.name, 321)
            prepared = await backend.prepare(SPEC)
            assert prepared.computed_tokens == prepared.prefix_tokens - 3
            assert is_alive(child.pid)
            assert os.getsid(child.pid) == child.pid  # Out of reach of a Ctrl-C that is meant for the service.
        finally:
            await backend.stop()
        assert child.returncode is not None
        assert not is_alive(child.pid)
        await backend.stop()

    asyncio.run(scenario())
    said = (stand_in / "logs" / "vllm.log").read_text(encoding="utf-8")
    for words in (f"--model {folder} ", f"--served-model-name {folder.name} ", "--host 127.0.0.1 ", "--block-size 32"):
        assert words in said
    assert "VLLM_API_KEY" not in os.environ


def test_a_server_that_ends_at_once_is_an_error_with_its_last_words(stand_in, tiny_model_folder):
    async def scenario():
        backend = VllmBackend(tiny_model_folder("llama"), stand_in / "vllm.log", options=("--fail",))
        message = r"vLLM ended with status 1 before it was ready; its output is in .*vllm.log, the last line: out of everything$"
        with pytest.raises(ModelError, match=message):
            await backend.start()
        await backend.stop()

    asyncio.run(scenario())


def test_a_server_that_lacks_the_model_is_ended(stand_in, tiny_model_folder):
    async def scenario():
        backend = VllmBackend(tiny_model_folder("llama"), stand_in / "vllm.log")
        backend._server.model = "another"
        with pytest.raises(ModelError, match="has no model 'another'"):
            await backend.start()
        assert backend._child is None
        await backend.stop()

    asyncio.run(scenario())


def test_a_folder_without_a_checkpoint_is_an_error_and_starts_nothing(stand_in):
    async def scenario():
        backend = VllmBackend(stand_in, stand_in / "vllm.log", python=Path(sys.executable))
        with pytest.raises(ModelError, match=r"no plain checkpoint \(config.json is missing\). Make one: manyicl export RUN"):
            await backend.start()
        await backend.stop()

    asyncio.run(scenario())
    assert not (stand_in / "vllm.log").exists()


def test_a_server_that_does_not_stop_is_killed_with_all_that_it_started(stand_in, tiny_model_folder, monkeypatch):
    monkeypatch.setattr(vllm_backend, "STOP_SECONDS", 0.2)

    async def scenario():
        backend = VllmBackend(tiny_model_folder("llama"), stand_in / "vllm.log", options=("--stubborn",))
        await backend.start()
        started = processes(stand_in / "vllm.log")
        assert [is_alive(pid) for pid in started] == [True, True]
        await backend.stop()
        wait_for(lambda: [is_alive(pid) for pid in started] == [False, False])

    asyncio.run(scenario())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells the server of the service's end")
def test_a_service_that_is_killed_takes_the_server_with_it(stand_in, tiny_model_folder):
    options = ("--data-dir", stand_in / "data", "--engine", "vllm")
    with served(tiny_model_folder("llama"), stand_in / "log", *options) as (service, _):
        (server,) = processes(stand_in / "data" / "vllm.log")
        assert is_alive(server)
        service.send_signal(signal.SIGKILL)
        wait_for(lambda: not is_alive(server))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells the server of the service's end")
def test_a_server_whose_service_has_ended_does_not_start():
    def run(parent):
        command = [sys.executable, "-c", vllm_backend._ENDS_WITH_PARENT, str(parent), "-c", "print('started')"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert run(os.getpid()) == "started\n"
    assert run(os.getppid()) == ""
