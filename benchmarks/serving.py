"""The service over HTTP against the bare engine and vLLM's own server: python benchmarks/serving.py --output FILE

Services run as processes of their own, as `manyicl serve` and vLLM start them, on the default model; requests, labels and callers
are made up here. The bare engine is in this process, on the same machine and with as many threads; bare and served work take
turns, and every ratio is the median of those of the rounds. Agreement comes first: the service gives the bare engine's labels and
probabilities for the same queries, as far as bf16 does when a prefix is computed in other slices, or nothing is reported.

    posted_to_answer   a file of examples is posted, its job awaited and a first query answered, over the bare prefill
    throughput         callers who each wait for their answer before they send the next query, over the bare engine, with batches
                       as large as there are callers and with all queries at once; and over vLLM's server, whose answers are
                       constrained to the labels, with the same callers, prefix and queries
    latency            one caller: what a query takes beyond the bare engine's time for it
    during_prefill     what one caller's queries take while another task is prepared, beside what they take otherwise
    overload           requests at the rate of `throughput` and at 20 times it, answered or not: what those that are admitted
                       take, and those that are refused
    restart            processes with 50 tasks on disk, from their start until they are ready, over a process that imports the
                       engine and loads the model
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from http_load import Caller, call_in_turn
from machine import describe_machine
from peer_vllm import BLOCK_TOKENS
from scoring import PLACES, THINGS, VERBS, make_example

from manyicl.modeling import export_model
from manyicl.serving.native_backend import open_native_engine
from manyicl.serving.training_files import shuffle_examples
from manyicl.tasks.task import Example

MODEL = "default"
HERE = Path(__file__).parent
TOLERANCE = 0.05  # On probabilities, on average: a bf16 prefix computed in other slices is off by a tenth of it.
LEAST_SAME = 0.95  # Share of queries with the same best label.
FLOOD_SECONDS = 10
FLOOD_CONNECTIONS = 256
OVERLOAD = 20  # Times what callers who wait get answered.

BARE_LOAD = "from manyicl.serving.native_backend import open_native_engine; open_native_engine('default')"
FORM = "multipart/form-data; boundary=edge"


def main() -> None:
    """Measure, print JSON and write it to --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--labels", type=int, default=8)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=50, help="tasks that a restart finds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vllm-python", type=Path, default=Path(".venv-vllm/bin/python"), help="make vllm-env makes it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = Measurement(arguments, Path(folder)).run()
    text = json.dumps(result | {"seconds_in_all": time.perf_counter() - start}, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


class Measurement:
    """What all parts share: the bare engine, its prefix, queries, and a folder."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.rng = random.Random(0)
        self.labels = [f"{verb} {thing}" for verb in VERBS for thing in THINGS][:: len(PLACES)][: arguments.labels]
        self.engine = open_native_engine(MODEL)
        self.examples = self.make_examples(arguments.examples)
        # The order in which a job puts them.
        self.prefix = self.engine.prefill(shuffle_examples(self.examples, seed=0))

    def make_examples(self, count: int) -> list[Example]:
        """Examples that were not made before."""
        return [make_example(self.rng, self.labels) for _ in range(count)]

    def make_queries(self) -> list[str]:
        """Queries that were not made before, so that no server finds them in a cache."""
        return [f"{example.input}, number {self.rng.randrange(10**6)}" for example in self.make_examples(self.arguments.queries)]

    def choose(self, inputs: Sequence[str]) -> np.ndarray:
        """Log-probabilities of the labels by the bare engine, as one call: [N, L]."""
        return np.stack(self.engine.choose(self.prefix, inputs, [self.labels] * len(inputs)))

    def run(self) -> dict[str, Any]:
        """Every part, agreement first."""
        with serving(self.folder / "data", self.arguments.threads) as address:
            make_task(address, "warm", self.make_examples(20), self.labels)
            parts = {"posted_to_answer": self.measure_posted(address)}
            make_task(address, "tickets", self.examples, self.labels)
            parts["agreement"] = self.compare(address)
            with self.vllm() as peer:
                parts["throughput"] = self.measure_throughput(address, peer)
            parts["latency"] = self.measure_latency(address)
            parts["during_prefill"] = self.measure_during_prefill(address)
        capacity = statistics.median(parts["throughput"]["served_queries_per_second"])
        parts["overload"] = self.measure_overload(capacity)
        print(json.dumps(parts), file=sys.stderr, flush=True)  # The rest takes a while; what is known is told.
        parts["restart"] = self.measure_restart()
        loaded = self.engine.loaded
        task = {
            "examples": self.arguments.examples,
            "labels": self.labels,
            "prefix_tokens": self.prefix.num_tokens,
            "queries": self.arguments.queries,
            "callers": self.arguments.callers,
        }
        versions = {"command": ["python", *sys.argv], "machine": describe_machine(), "threads": self.arguments.threads}
        return versions | {"model": f"{loaded.name} ({loaded.note}), {loaded.model.dtype}", "task": task} | parts

    def measure_posted(self, address: str) -> dict[str, Any]:
        """From examples to the first answer, each round with others."""
        bare, served = [], []
        for number in range(self.arguments.repeats):
            examples = self.make_examples(self.arguments.examples)
            bare.append(timed(lambda: self.engine.prefill(examples))[1])  # noqa: B023
            start = time.perf_counter()
            make_task(address, f"posted-{number}", examples, self.labels)
            classify(address, f"posted-{number}", examples[0].input)
            served.append(time.perf_counter() - start)
        ratio = statistics.median(one / other for one, other in zip(served, bare, strict=True))
        return {"bare_prefill_seconds": bare, "served_seconds": served, "ratio": ratio}

    def compare(self, address: str) -> dict[str, Any]:
        """How far served probabilities are from the bare engine's."""
        inputs = self.make_queries()
        bodies = [{"model": "tickets", "input": text} for text in inputs]
        _, answers, _ = call_in_turn(address, "/v1/classify", bodies, callers=self.arguments.callers)
        served = [answer["data"][0] for answer in answers]
        found = np.array([[own["probabilities"][label] for label in self.labels] for own in served])
        scores = self.choose(inputs)
        expected = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        change = np.abs(found - expected)
        same = float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())
        if change.mean() > TOLERANCE or same < LEAST_SAME:
            raise SystemExit(f"served probabilities are off by {change.mean():.3f}, {same:.1%} of labels the same; not reported")
        return {"mean_change": float(change.mean()), "largest_change": float(change.max()), "same_best_label": same}

    def measure_throughput(self, address: str, peer: "VllmServer | None") -> dict[str, Any]:
        """Queries a second of callers, of the bare engine before and after them, and of the peer."""
        callers, rounds, agreed = self.arguments.callers, [], []
        for _ in range(self.arguments.repeats):
            inputs = self.make_queries()
            batches = [inputs[first : first + callers] for first in range(0, len(inputs), callers)]
            small = [timed(lambda: [self.choose(batch) for batch in batches])[1]]  # noqa: B023
            bodies = [{"model": "tickets", "input": text} for text in inputs]
            served, answers, waited = call_in_turn(address, "/v1/classify", bodies, callers=callers)
            small.append(timed(lambda: [self.choose(batch) for batch in batches])[1])  # noqa: B023
            _, whole = timed(lambda: self.choose(inputs))  # noqa: B023
            other: dict[str, float] = {}
            if peer is not None:
                other, labels = peer.answer(self.make_queries(), inputs, callers)
                own = [answer["data"][0]["label"] for answer in answers]
                agreed += [label == mine for label, mine in zip(labels, own, strict=True)]
            seconds = {"served": served, "batches_of_callers": statistics.mean(small), "all_at_once": whole, **other}
            rounds.append({name: len(inputs) / took for name, took in seconds.items()})
            rounds[-1]["served_p50_ms"] = 1000 * statistics.median(waited)
        peers = [name for name in rounds[0] if name not in ("served", "served_p50_ms")]
        result = {"served_queries_per_second": [own["served"] for own in rounds], "rounds": rounds}
        result |= {f"ratio_to_{name}": statistics.median(own["served"] / own[name] for own in rounds) for name in peers}
        if peer is None:
            return result | {"vllm": "absent"}
        return result | {"vllm": peer.describe(), "same_label_as_vllm": statistics.mean(agreed)}

    def measure_latency(self, address: str) -> dict[str, float]:
        """Milliseconds of a lone query, bare and served in turn; what is added is the median of the differences."""
        caller, pairs = Caller(address), []
        for text in self.make_queries()[:100]:
            _, bare = timed(lambda: self.choose([text]))  # noqa: B023
            _, served = timed(lambda: caller.call("POST", "/v1/classify", {"model": "tickets", "input": text}))  # noqa: B023
            pairs.append((1000 * bare, 1000 * served))
        caller.close()
        return {
            "pairs": len(pairs),
            "bare_p50_ms": statistics.median(bare for bare, _ in pairs),
            "served_p50_ms": statistics.median(served for _, served in pairs),
            "added_p50_ms": statistics.median(served - bare for bare, served in pairs),
        }

    def measure_during_prefill(self, address: str) -> dict[str, Any]:
        """Milliseconds of a lone caller's queries with and without a task being prepared beside them."""
        caller, texts = Caller(address), self.make_queries()

        def ask(text: str) -> float:
            return 1000 * timed(lambda: caller.call("POST", "/v1/classify", {"model": "tickets", "input": text}))[1]

        alone = [ask(text) for text in texts[:40]]
        job = start_job(caller, "beside", self.make_examples(self.arguments.examples), self.labels)
        beside: list[float] = []
        while read_job(caller, job)["status"] in ("queued", "running"):
            beside.append(ask(texts[len(beside) % len(texts)]))
        caller.close()
        found = {"alone_p50_ms": statistics.median(alone), "beside_p50_ms": statistics.median(beside)}
        return found | {"beside_max_ms": max(beside), "queries_meanwhile": len(beside)}

    def measure_overload(self, capacity: float) -> dict[str, Any]:
        """As many requests as can be answered, and then many more, at a service whose queue holds one batch."""
        callers = self.arguments.callers
        with serving(self.folder / "overload", self.arguments.threads, "--max-queue", str(callers)) as address:
            make_task(address, "tickets", self.examples, self.labels)
            bodies = [{"model": "tickets", "input": text} for text in self.make_queries()]

            def call(number: int) -> dict[str, float]:
                seconds, _, waited = call_in_turn(address, "/v1/classify", bodies, callers=number)
                return {
                    "callers": number,
                    "queries_per_second": len(bodies) / seconds,
                    "p50_ms": 1000 * statistics.median(waited),
                }

            # Twice as many callers as places: as many wait as are computed, as in an overload, and nobody else sends.
            found: dict[str, Any] = {"max_queue": callers, "before": call(callers), "full": call(2 * callers)}
            found |= {"at_capacity": self._flood(address, bodies, capacity)}
            found |= {"overloaded": self._flood(address, bodies, OVERLOAD * capacity) | {"times_capacity": OVERLOAD}}
            found |= {"after": call(callers)}
        admitted = found["overloaded"]["statuses"]["200"]["p50_ms"]
        return found | {
            "admitted_p50_over_full": admitted / found["full"]["p50_ms"],
            "admitted_p50_over_at_capacity": admitted / found["at_capacity"]["statuses"]["200"]["p50_ms"],
        }

    def _flood(self, address: str, bodies: Sequence[Any], rate: float) -> dict[str, Any]:
        """What became of requests at a rate, sent by another process."""
        job = {"address": address, "path": "/v1/classify", "bodies": bodies, "connections": FLOOD_CONNECTIONS}
        path = self.folder / "flood.json"
        path.write_text(json.dumps(job | {"rate": rate, "seconds": FLOOD_SECONDS}), encoding="utf-8")
        shown = subprocess.run([sys.executable, str(HERE / "http_load.py"), str(path)], check=True, capture_output=True)
        found: dict[str, Any] = json.loads(shown.stdout)
        if not set(found["statuses"]) <= {"200", "429"}:
            raise SystemExit(f"an overloaded service answered {found['statuses']}; nothing is reported")
        admitted = found["statuses"]["200"]["count"] / found["seconds"]
        return found | {"wanted_per_second": rate, "wanted_seconds": FLOOD_SECONDS, "admitted_per_second": admitted}

    def measure_restart(self) -> dict[str, Any]:
        """A service on a folder of tasks that another has left, and a process that only loads the model, in turn."""
        data, tasks = self.folder / "restart", self.arguments.tasks
        with serving(data, self.arguments.threads) as address:
            for number in range(tasks):
                make_task(address, f"task-{number}", self.make_examples(40), self.labels)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.arguments.threads)}
        bare, ready, first = [], [], []
        for _ in range(self.arguments.repeats):
            command = [sys.executable, "-c", BARE_LOAD]
            bare.append(timed(lambda: subprocess.run(command, check=True, env=environment))[1])  # noqa: B023
            start = time.perf_counter()
            with serving(data, self.arguments.threads) as address:
                ready.append(time.perf_counter() - start)
                seconds = [timed(lambda: classify(address, f"task-{own}", "my bill"))[1] for own in range(tasks)]  # noqa: B023
                first.append(1000 * statistics.median(seconds))
        beyond = statistics.median(own - other for own, other in zip(ready, bare, strict=True))
        found = {"tasks": tasks, "import_and_load_seconds": bare, "ready_seconds": ready, "beyond_seconds": beyond}
        return found | {"first_answers_p50_ms": first}

    @contextlib.contextmanager
    def vllm(self) -> "Iterator[VllmServer | None]":
        """vLLM's own server on the same model, if there is one."""
        if not self.arguments.vllm_python.is_file():
            yield None
            return
        folder = self.folder / "model"
        export_model(MODEL, folder)
        server = VllmServer(self, folder)
        try:
            server.wait()
            yield server
        finally:
            server.end()


class VllmServer:
    """The peer: constrained decoding of a label behind the same token ids."""

    def __init__(self, measurement: Measurement, folder: Path) -> None:
        self._encoder, self._labels = measurement.engine.encoder, measurement.labels
        self._prefix = [int(token) for token in measurement.prefix.token_ids]
        port, threads = free_port(), measurement.arguments.threads
        self.address = f"http://127.0.0.1:{port}"
        options = [
            "--max-model-len",
            "8192",
            "--enable-prefix-caching",
            "--block-size",
            str(BLOCK_TOKENS),
            "--max-num-seqs",
            "128",
        ]
        options += ["--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "peer"]
        command = [str(measurement.arguments.vllm_python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        bind = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
        self._log = (measurement.folder / "vllm.log").open("wb")
        self._process = subprocess.Popen([*command, *options], stdout=self._log, stderr=self._log, env=os.environ | bind)

    def wait(self) -> None:
        """Until it answers, and its prefix and grammar are warm."""
        wait_for(self.address + "/health", self._process, seconds=600, log=Path(self._log.name))
        for _ in range(2):
            self._ask(["a warm query"] * 4, self._prefix, 2)

    def answer(self, other: Sequence[str], inputs: Sequence[str], callers: int) -> tuple[dict[str, float], list[str]]:
        """Seconds for other queries behind the part of the prefix that its cache holds, and for these behind all of it."""
        whole = self._prefix[: len(self._prefix) // BLOCK_TOKENS * BLOCK_TOKENS]
        on_blocks, _ = self._ask(other, whole, callers)
        seconds, labels = self._ask(inputs, self._prefix, callers)
        return {"vllm": seconds, "vllm_on_whole_blocks": on_blocks}, labels

    def _ask(self, inputs: Sequence[str], prefix: list[int], callers: int) -> tuple[float, list[str]]:
        texts = [f" {label}" for label in self._labels]
        common = {"model": "peer", "max_tokens": 32, "temperature": 0, "structured_outputs": {"choice": texts}}
        common["stop_token_ids"] = [self._encoder.terminator_id]
        bodies = [common | {"prompt": [*prefix, *self._encoder.encode_query(text)]} for text in inputs]
        seconds, answers, _ = call_in_turn(self.address, "/v1/completions", bodies, callers=callers)
        return seconds, [answer["choices"][0]["text"].strip() for answer in answers]

    def describe(self) -> dict[str, Any]:
        """What it is."""
        version = Caller(self.address).call("GET", "/version")["version"]
        outside = len(self._prefix) % BLOCK_TOKENS
        return {"version": version, "block_tokens": BLOCK_TOKENS, "tokens_outside_blocks": outside}

    def end(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(60)
        self._log.close()


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the seconds that it took."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def serving(data: Path, threads: int, *options: str) -> Iterator[str]:
    """A running service's address, once it is ready; stopped at the end."""
    port = free_port()
    command = [sys.executable, "-m", "manyicl", "serve", "--model", MODEL, "--data-dir", str(data), "--port", str(port), *options]
    log = data.with_suffix(".log")
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    try:
        wait_for(f"http://127.0.0.1:{port}/readyz", process, seconds=120, log=log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_for(url: str, process: subprocess.Popen[bytes], *, seconds: float, log: Path) -> None:
    """Until an address answers 200."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.01)
    raise SystemExit(f"{url} does not answer: {log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


def start_job(caller: Caller, name: str, examples: Sequence[Example], labels: Sequence[str]) -> str:
    """Post a file of examples and begin to make a model of it; the job's id."""
    lines = "".join(json.dumps({"prompt": example.input, "completion": example.answer}) + "\n" for example in examples)
    head = '--edge\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    head += '--edge\r\nContent-Disposition: form-data; name="file"; filename="t.jsonl"\r\n\r\n'
    uploaded = caller.call("POST", "/v1/files", f"{head}{lines}\r\n--edge--\r\n".encode(), kind=FORM)
    # Named, as among few examples a label may stand once, which makes all answers free text.
    wanted = {"model": "base", "training_file": uploaded["id"], "suffix": name, "labels": labels}
    job = caller.call("POST", "/v1/fine_tuning/jobs", wanted)
    return str(job["id"])


def read_job(caller: Caller, job: str) -> Any:
    """A job as the service tells it."""
    return caller.call("GET", f"/v1/fine_tuning/jobs/{job}")


def make_task(address: str, name: str, examples: Sequence[Example], labels: Sequence[str]) -> None:
    """Make a model of examples, and wait for it."""
    caller = Caller(address)
    job = start_job(caller, name, examples, labels)
    while (found := read_job(caller, job))["status"] in ("queued", "running"):
        time.sleep(0.005)
    caller.close()
    if found["status"] != "succeeded":
        raise SystemExit(f"the job of {name} ended as {found['status']}: {found['error']}")


def classify(address: str, name: str, text: str) -> Any:
    """The labels of one input."""
    caller = Caller(address)
    answer = caller.call("POST", "/v1/classify", {"model": name, "input": text})
    caller.close()
    return answer


if __name__ == "__main__":
    main()
