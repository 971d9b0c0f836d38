"""A saved prefix against prefilling it, and what int8 costs: python benchmarks/prefix_files.py --output FILE

A prefix of about 7,500 tokens of a built-in validation task is prefilled with the default model, saved, and opened and verified
in a fresh process, whose states must be bit for bit those saved before any time counts. The file's pages are in memory by then
(it has just been written): opening costs the mapping and one checksum over all bytes. Also: an appended demonstration that finds
room and one that does not; and the scores of queries behind int8 states, against those of bf16 and of fp32.

Times are the best of `--repeats`; the prefill is run `--prefills` times, and `first_open` is the first opening of its process. On
a machine that is busy otherwise take `--threads 1 --clock cpu`, which counts the process's own processor time.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from machine import describe_machine

from manyicl import Encoder, LoadedModel, Prefix, Task, extend, load_model, load_suite, prefill, score_labels
from manyicl.episodes import fill_budget
from manyicl.planning import pass_bytes, prefill_operations, prefix_bytes
from manyicl.prefix import PREFILL_CHUNK_TOKENS, quantise
from manyicl.prefix_files import PrefixFacts, identify_prefix, open_any_prefix, save_prefix

TASK = "opening_hours"
INT8_TASKS = ("opening_hours", "advice_invented_words")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    """Measure, print JSON and write it to --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=7500)
    parser.add_argument("--int8-tokens", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=80)
    parser.add_argument("--prefills", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument(
        "--open", type=Path, default=None, help="open this folder and print how long it took; used by the benchmark"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.open:
        print(json.dumps(open_repeatedly(arguments.open, CLOCKS[arguments.clock], arguments.repeats)))
        return
    loaded = load_model("default")
    result = {
        "machine": describe_machine(),
        "clock": arguments.clock,
        "page_cache": "warm: the file has just been written and is read from memory",
        "model": f"{loaded.name} ({loaded.note}), {loaded.model.dtype}",
        "files": measure_files(loaded, arguments),
        "int8": measure_int8(loaded, arguments),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


def measure_files(loaded: LoadedModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prefill, save, open and append, in seconds, and memory forecast and taken."""
    clock = CLOCKS[arguments.clock]
    encoder, task = Encoder(loaded.tokenizer), load_suite("builtin").tasks[TASK]
    fitting, _ = fill_budget(task.train, instruction=task.instruction, counter=encoder, max_tokens=arguments.tokens)
    prefill(loaded.model, encoder, fitting[:4])  # Loads kernels and warms up.
    prefills, peak = [], 0
    for _ in range(arguments.prefills):
        base = reset_peak_memory()
        start = clock()
        prefix = prefill(loaded.model, encoder, fitting, instruction=task.instruction)
        prefills.append(clock() - start)
        peak = read_status("VmHWM") - base
    config, dtype = loaded.model.config, loaded.model.dtype
    files = {}
    for name, kept in (("plain", prefix), ("int8", quantise(prefix))):
        files[name] = measure_folder(kept, facts_of(loaded, encoder, task), min(prefills), arguments)
    extra = [demonstration for demonstration in task.train if demonstration not in fitting][:1]
    grown, copied = timed(clock, lambda: extend(loaded.model, encoder, prefix, extra))
    _, in_place = timed(clock, lambda: extend(loaded.model, encoder, grown, extra))
    return {
        "task": TASK,
        "prefix_tokens": prefix.num_tokens,
        "demonstrations": prefix.num_shots,
        "prefill_seconds": min(prefills),
        "prefill_operations": prefill_operations(config, prefix.num_tokens),
        "forecast_bytes": {
            "prefix": prefix_bytes(config, prefix.num_tokens, dtype),
            "while_prefilling": pass_bytes(config, min(prefix.num_tokens, PREFILL_CHUNK_TOKENS), dtype),
        },
        "peak_bytes_of_prefill": peak,
        "append_one_demonstration_seconds": {"into_room": in_place, "into_a_copy": copied},
        **files,
    }


def measure_folder(prefix: Prefix, facts: PrefixFacts, prefill_seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Save, then open in a fresh process; agreement first."""
    clock = CLOCKS[arguments.clock]
    with tempfile.TemporaryDirectory() as folder:
        saves = [timed(clock, lambda: save_prefix(prefix, facts, Path(folder)))[1] for _ in range(arguments.repeats)]
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        command = [sys.executable, __file__, "--open", folder, "--repeats", str(arguments.repeats)]
        command += ["--threads", str(arguments.threads), "--clock", arguments.clock]
        opened = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if opened["hash"] != hash_states(prefix):
        raise SystemExit("the opened prefix is not the saved one, bit for bit; nothing is reported")
    return {
        "bit_identical": True,
        "file_bytes": size,
        "save_seconds": min(saves),
        "first_open_seconds": opened["seconds"][0],
        "open_seconds": min(opened["seconds"]),
        "prefill_over_first_open": prefill_seconds / opened["seconds"][0],
        "prefill_over_open": prefill_seconds / min(opened["seconds"]),
    }


def open_repeatedly(folder: Path, clock: Callable[[], float], repeats: int) -> dict[str, Any]:
    """Seconds of each opening, verification included, and a hash of what was opened."""
    seconds = []
    for _ in range(repeats):
        (prefix, _), taken = timed(clock, lambda: open_any_prefix(folder))
        seconds.append(taken)
    return {"seconds": seconds, "hash": hash_states(prefix)}


def measure_int8(loaded: LoadedModel, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """How log-probabilities of labels change with int8 states; fp32 shows what bf16 itself changes."""
    exact = load_model("default", dtype="float32")
    results = []
    for name in INT8_TASKS:
        task = load_suite("builtin").tasks[name]
        scores: dict[str, npt.NDArray[np.float64]] = {}
        for kind, model in (("bf16", loaded), ("fp32", exact)):
            encoder = Encoder(model.tokenizer)
            fitting, _ = fill_budget(task.train, instruction=task.instruction, counter=encoder, max_tokens=arguments.int8_tokens)
            prefix = prefill(model.model, encoder, fitting, instruction=task.instruction)
            scores[kind] = score_queries(model, encoder, task, prefix, arguments.queries)
            scores[f"{kind} int8"] = score_queries(model, encoder, task, quantise(prefix), arguments.queries)
        pairs = (("bf16", "bf16 int8"), ("fp32", "fp32 int8"), ("fp32", "bf16"), ("fp32", "bf16 int8"))
        results.append(
            {
                "task": name,
                "labels": len(task.labels),
                "queries": len(scores["bf16"]),
                "prefix_tokens": prefix.num_tokens,
                "changes": {f"{first} -> {second}": compare(scores[first], scores[second]) for first, second in pairs},
            }
        )
    return results


def score_queries(loaded: LoadedModel, encoder: Encoder, task: Task, prefix: Prefix, num_queries: int) -> npt.NDArray[np.float64]:
    """Log-probability of each label after each query: [queries, labels]."""
    queries = [encoder.encode_query(query.input) for query in task.test[:num_queries]]
    labels = encoder.encode_labels(task.labels)
    return np.stack(score_labels(loaded.model, prefix, queries, [labels] * len(queries)))


def compare(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> dict[str, float]:
    """Change in log-probability, in nats, and how often the best label is the same."""
    change = np.abs(first - second)
    same = (first.argmax(axis=1) == second.argmax(axis=1)).mean()
    return {"max": float(change.max()), "mean": float(change.mean()), "argmax_agreement": float(same)}


def facts_of(loaded: LoadedModel, encoder: Encoder, task: Task) -> PrefixFacts:
    """What is saved beside a task's prefix."""
    identity = identify_prefix(loaded.model, loaded.fingerprint, encoder)
    return PrefixFacts(identity=identity, instruction=task.instruction, labels=task.labels)


def hash_states(prefix: Prefix) -> str:
    """SHA-256 over tokens and every state as the model reads it."""
    digest = hashlib.sha256(repr((prefix.token_ids, prefix.stops)).encode())
    for pair in prefix.states:
        for part in pair:
            digest.update(part.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def timed(clock: Callable[[], float], function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and its seconds."""
    start = clock()
    result = function()
    return result, clock() - start


def reset_peak_memory() -> int:
    """Forget the highest memory so far and return the present, in bytes; 0 on systems other than Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return 0
    return read_status("VmRSS")


def read_status(name: str) -> int:
    """A number of bytes from /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
