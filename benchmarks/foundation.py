"""The foundation's result, end to end: rate chosen on validation tasks, one tuned model, shot curves on all held-out tasks.

    python benchmarks/foundation.py --tasks ../shared/data --work runs/foundation --output docs/results

1. Three short runs (a tenth of the updates) choose the learning rate by the loss on the validation tasks; a winning edge is
   extended.
2. The run of recipes/real.yaml with that rate.
3. Base and tuned on every held-out task at 0, 1, 4, 16, 64 and max shots, three orders of demonstrations, 100 queries.
4. Bits per byte of two plain-text corpora before and after.
5. Tokens and answers a second, peak memory and the share of the machine's matrix-product rate.

Every step is a command of the command line and goes on where it was stopped. The page that it writes is made from the records.
"""

import argparse
import gzip
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manyicl.files import write_bytes_atomic, write_json_atomic, write_text_atomic
from manyicl.records import EvaluationRecord, read_records
from manyicl.reporting.terminal import markdown_curves
from manyicl.tasks.readers import load_suite

RECIPE = "recipes/real.yaml"
RATES = [2.0e-4, 6.0e-4, 2.0e-3]
SEARCH_UPDATES = 16
SHOTS = "0,1,4,16,64,max"


class Bench:
    """Runs commands one after the other and remembers what each was and how long it took."""

    def __init__(self, work: Path) -> None:
        self.path = work / "commands.json"
        self.commands: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def run(self, name: str, command: list[str]) -> None:
        """Run a command to its end, unless an earlier call has done so."""
        shown = shlex.join(command)
        if self.commands.get(name, {}).get("command") == shown:
            return
        print(f"[{name}] {shown}", flush=True)
        start = time.perf_counter()
        subprocess.run([sys.executable, *command[1:]] if command[0] == "python" else [sys.executable, "-m", *command], check=True)
        self.commands[name] = {"command": shown, "seconds": round(time.perf_counter() - start, 1)}
        write_json_atomic(self.path, self.commands)


def search_rate(bench: Bench, work: Path, tasks: str) -> tuple[float, dict[float, float]]:
    """The rate with the lowest validation loss, and the losses of all that were tried; a winning edge is extended."""
    losses: dict[float, float] = {}
    rates = list(RATES)
    while rates:
        rate = rates.pop(0)
        output = work / f"rate-{rate:g}"
        overrides = [f"tasks={tasks}", f"output={output}", f"training.learning_rate={rate:g}"]
        overrides += [f"training.num_steps={SEARCH_UPDATES}", f"training.save_every={SEARCH_UPDATES}"]
        bench.run(output.name, ["manyicl", "train", RECIPE, *overrides, "--resume"])
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        losses[rate] = summary["validation_losses"][-1][1]
        best = min(losses, key=losses.__getitem__)
        if not rates and best == max(losses) and best < 0.1:
            rates.append(best * 3)
        elif not rates and best == min(losses) and best > 1e-6:
            rates.append(best / 3)
    return min(losses, key=losses.__getitem__), losses


def write_page(work: Path, output: Path, losses: dict[float, float], bench: Bench, *, held_out: Sequence[str]) -> None:
    """Write the page and, beside it, the records and figures that it is made from; tasks that are not done are named."""
    facts = {name: _read_json(work / "tuned" / f"{name}.json") for name in ("speed", "run", "summary")}
    facts |= {"corpora": _read_json(work / "corpora.json"), "commands": bench.commands}
    folder = output / "foundation"
    write_bytes_atomic(folder / "records.jsonl.gz", gzip.compress((work / "records.jsonl").read_bytes(), mtime=0))
    write_text_atomic(folder / "recipe.yaml", (work / "tuned" / "recipe.yaml").read_text(encoding="utf-8"))
    for name, content in facts.items():
        write_json_atomic(folder / f"{name}.json", content)
    records = read_records(work / "records.jsonl")
    cells = {name: {record.key[1:] for record in records if record.task == name} for name in held_out}
    done = [name for name in held_out if _is_done(cells[name])]
    open_tasks = [name for name in held_out if name not in done]
    shown = [
        record.model_copy(update={"model": "base" if record.model == "default" else "tuned"})
        for record in records
        if record.task in done
    ]
    machine, note = facts["speed"]["machine"], facts["run"]["model"]["note"]
    lines = [
        "# The foundation's result: base against many-shot tuned on held-out tasks",
        "",
        "Made by `make bench-foundation` (`benchmarks/foundation.py`) from the records and figures in `foundation/`.",
        f"Model: SmolLM2-135M-Instruct, {note}. Machine: {machine['processor']}, {machine['threads']} threads, no GPU;",
        f"torch {machine['torch']}, transformers {machine['transformers']}. The recipe's seed is 0.",
        "",
        "## Held-out tasks by shots",
        "",
        "Tasks that were neither trained on nor chose anything. The context is 8,192 tokens, where rows in training had",
        "2,048: `max` asks for more than was trained. A dash, or a count of tasks, marks shot counts that do not fit.",
        "",
        *([f"Not evaluated yet, and not in this table: {', '.join(open_tasks)}.", ""] if open_tasks else []),
        markdown_curves(shown),
        "",
        *_training_lines(facts, losses),
        "",
        "## Forgetting",
        "",
        "Bits per byte of the first 100 kB of two plain-text corpora, windows of 2,048 tokens; lower is better.",
        "",
        "| corpus | base | tuned | change |",
        "|---|---:|---:|---:|",
        *_corpus_lines(facts["corpora"]["results"]),
        "",
        "## Commands and wall time",
        "",
        f"Evaluation, by its records: {_evaluation_seconds(records):.0f} s of prefilling and answering in all its sittings.",
        "",
        "| step | seconds | command |",
        "|---|---:|---|",
        *(f"| {name} | {entry['seconds']:.0f} | `{entry['command']}` |" for name, entry in bench.commands.items()),
        "",
    ]
    write_text_atomic(output / "foundation.md", "\n".join(lines))


def _evaluation_seconds(records: Sequence[EvaluationRecord]) -> float:
    """Seconds of answering in every cell, and of the prefill that the cells of one order and sitting shared."""
    prefills = {(record.model, record.task, record.seed, record.prefill_seconds) for record in records}
    return sum(record.seconds for record in records) + sum(seconds for *_, seconds in prefills)


def _is_done(cells: set[tuple[object, ...]]) -> bool:
    """Whether both models have the same cells of a task, `max` of each of three orders among them."""
    by_model: dict[object, set[tuple[object, ...]]] = {}
    for model, *cell in cells:
        by_model.setdefault(model, set()).add(tuple(cell))
    first, *others = by_model.values() or [set()]
    return len(others) == 1 and others[0] == first and sum("max" in cell for cell in first) == 3


def _training_lines(facts: dict[str, Any], losses: dict[float, float]) -> list[str]:
    speed = facts["speed"]
    return [
        "## Learning rate",
        "",
        f"Chosen by the mean token loss on many-shot rows of the validation tasks after {SEARCH_UPDATES} updates:",
        "",
        "| learning rate | validation loss |",
        "|---:|---:|",
        *(f"| {rate:g} | {loss:.4f} |" for rate, loss in sorted(losses.items())),
        "",
        "## Training",
        "",
        "| figure | value |",
        "|---|---:|",
        f"| updates | {speed['updates']} |",
        f"| tokens | {speed['tokens']:,} |",
        f"| supervised answers | {speed['answers']:,} |",
        f"| target tokens | {speed['targets']:,} |",
        f"| seconds of updates | {speed['seconds']:.0f} |",
        f"| tokens/s | {speed['tokens_per_second']:.0f} |",
        f"| supervised answers/s | {speed['answers_per_second']:.1f} |",
        f"| peak memory of the process | {speed['peak_memory_bytes'] / 2**30:.1f} GiB |",
        f"| bf16 matrix products of this machine | {speed['matrix_rate_per_second'] / 1e9:.0f} GFLOP/s |",
        f"| share of that rate | {100 * speed['share_of_limit']:.0f}% |",
        f"| weights kept | update {facts['summary']['best_step']}, the best by validation loss |",
        "",
        "The share counts the operations that a step needs (`training_operations` in `benchmarks/machine.py`).",
    ]


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _corpus_lines(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for corpus in dict.fromkeys(row["corpus"] for row in results):
        base, tuned = (float(row["bits_per_byte"]) for row in results if row["corpus"] == corpus)
        lines.append(f"| {corpus} | {base:.4f} | {tuned:.4f} | {tuned - base:+.4f} |")
    return lines


def main() -> None:
    """Run every step that is not done, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="../shared/data", help="folder of the suite, with a folder `corpus` of plain texts")
    parser.add_argument("--work", type=Path, default=Path("runs/foundation"), help="runs and records")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="where the page goes")
    parser.add_argument("--page", action="store_true", help="only write the page, from the records there are")
    options = parser.parse_args()
    work, tuned = options.work, options.work / "tuned"
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work)
    rate, losses = search_rate(bench, work, options.tasks)
    overrides = [f"tasks={options.tasks}", f"output={tuned}", f"training.learning_rate={rate:g}"]
    bench.run("tuned", ["manyicl", "train", RECIPE, *overrides, "--resume"])
    bench.run("speed", ["python", "benchmarks/training_run.py", str(tuned)])
    texts = [part for path in sorted(Path(options.tasks, "corpus").glob("*.txt")) for part in ("--text", str(path))]
    models = ["--model", "default", "--model", str(tuned)]
    bench.run("corpora", ["manyicl", "corpus", *models, *texts, "--output", str(work / "corpora.json")])
    held_out = load_suite(options.tasks).held_out
    if options.page:
        return write_page(work, options.output, losses, bench, held_out=held_out)
    evaluation = ["--tasks", options.tasks, "--shots", SHOTS, "--seeds", "3", "--queries", "100"]
    bench.run("evaluate", ["manyicl", "evaluate", *models, *evaluation, "--output", str(work / "records.jsonl")])
    write_page(work, options.output, losses, bench, held_out=held_out)
    print(f"written to {options.output / 'foundation.md'}")


if __name__ == "__main__":
    main()
