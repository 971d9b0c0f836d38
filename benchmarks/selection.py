"""Which demonstrations help: random, nearest and hybrid at the same number of demonstrations.

    python benchmarks/selection.py --tasks ../shared/data --output runs/selection.json

For each validation task with a label set (validation tasks choose, held-out tasks do not), the library is the whole training
split and the queries are the first of the test split. At each number of demonstrations:

    random    one block of that many, prefilled once
    hybrid    three quarters in a block, prefilled once; a quarter retrieved for each query
    nearest   all of them retrieved for each query

random and hybrid are drawn with `--seeds` seeds; nearest depends on none, but for ties. Values are those of the task's metric;
seconds are those of `predict` over all queries at once, divided by their number, without `fit`. Each cell is on file in the
records beside the output before the next is computed, so that a run that was stopped goes on.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine

from manyicl import ManyShotClassifier, Task, load_suite
from manyicl.estimator.shared_models import share_model
from manyicl.files import write_json_atomic
from manyicl.metrics import aggregate
from manyicl.records import EvaluationRecord, QueryScores, RecordWriter

LIBRARIES = ("manyicl", "torch", "transformers", "bm25s", "scikit-learn")


@dataclass(frozen=True)
class Cell:
    """One way of choosing `shots` demonstrations on one task."""

    task: Task
    selection: str
    shots: int
    seed: int

    def parameters(self) -> dict[str, Any]:
        """The classifier's parameters, at `shots` demonstrations before each query."""
        retrieved = {"random": 0, "hybrid": self.shots // 4, "nearest": self.shots}[self.selection]
        parameters: dict[str, Any] = {"selection": self.selection, "random_state": self.seed}
        if self.selection != "nearest":
            parameters["num_shots"] = self.shots - retrieved
        if retrieved:
            parameters["num_nearest"] = retrieved
        return parameters


def cells(tasks: list[Task], shots: list[int], num_seeds: int) -> Iterator[Cell]:
    """Every cell, task by task."""
    for task in tasks:
        for count in shots:
            for selection in ("random", "hybrid", "nearest"):
                yield from (Cell(task, selection, count, seed) for seed in range(1 if selection == "nearest" else num_seeds))


def measure(cell: Cell, model: str, num_queries: int, fingerprint: str) -> EvaluationRecord:
    """Fit and predict one cell."""
    task, queries = cell.task, cell.task.test[:num_queries]
    classifier = ManyShotClassifier(model, instruction=task.instruction, **cell.parameters())
    start = time.perf_counter()
    classifier.fit([example.input for example in task.train], [example.answer for example in task.train])
    fitted = time.perf_counter()
    predicted = classifier.predict([query.input for query in queries])
    seconds = time.perf_counter() - fitted
    gold = [task.labels.index(query.answer) for query in queries]
    found = [task.labels.index(str(label)) for label in predicted]
    scores = [float(own == right) for own, right in zip(found, gold, strict=True)]
    loaded = share_model(model, "auto").loaded
    prefix = classifier.open_prefixes()[0]
    if prefix.num_shots != cell.parameters().get("num_shots", 0):
        raise SystemExit(
            f"{task.name}: {cell.shots} demonstrations do not fit ({prefix.num_shots} in the prefix). Ask for fewer."
        )
    return EvaluationRecord(
        method=cell.selection,
        model=model,
        model_note=loaded.note,
        task=task.name,
        family=task.family,
        role="validation",
        metric=task.metric,
        shots=cell.shots,
        num_demonstrations=cell.shots,
        seed=cell.seed,
        value=aggregate(task.metric, scores, gold, found),
        num_queries=len(queries),
        prefix_tokens=prefix.num_tokens,
        query_tokens=sum(len(ids) for ids in query_ids(classifier, [query.input for query in queries])),
        seconds=seconds,
        prefill_seconds=fitted - start,
        fingerprint=fingerprint,
        versions={library: version(library) for library in LIBRARIES},
        queries=QueryScores(ids=list(range(len(queries))), scores=scores, gold=gold, predicted=found),
    )


def query_ids(classifier: ManyShotClassifier, texts: list[str]) -> list[tuple[int, ...]]:
    """What is computed for each query: retrieved demonstrations and the query."""
    (groups,) = classifier._group_queries(classifier._engine(), texts)
    return [ids for group in groups for ids in group.token_ids]


def summarise(records: list[EvaluationRecord]) -> list[dict[str, Any]]:
    """One row per task, number of demonstrations and selection: means over seeds."""
    rows = []
    for key in dict.fromkeys((record.task, record.shots, record.method) for record in records):
        own = [record for record in records if (record.task, record.shots, record.method) == key]
        values = [record.value for record in own]
        rows.append(
            {
                "task": key[0],
                "metric": own[0].metric,
                "demonstrations": key[1],
                "selection": key[2],
                "value": float(np.mean(values)),
                "values": values,
                "milliseconds_per_query": 1000 * float(np.mean([record.seconds / record.num_queries for record in own])),
                "tokens_per_query": float(np.mean([record.query_tokens / record.num_queries for record in own])),
                "fit_seconds": float(np.mean([record.prefill_seconds for record in own])),
                "prefix_tokens": float(np.mean([record.prefix_tokens for record in own])),
                "queries": own[0].num_queries,
            }
        )
    return rows


def main() -> None:
    """Measure every cell that is not on file, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--tasks", default="../shared/data", help="a suite with validation tasks")
    parser.add_argument("--only", nargs="*", help="names of the tasks; all validation tasks without it")
    parser.add_argument("--shots", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("runs/selection.json"))
    options = parser.parse_args()
    tasks = [task for task in load_suite(options.tasks).select("validation") if task.labels]
    tasks = [task for task in tasks if not options.only or task.name in options.only]
    writer = RecordWriter(options.output.with_suffix(".records.jsonl"))
    model_fingerprint = share_model(options.model, "auto").loaded.fingerprint
    records = []
    for cell in cells(tasks, options.shots, options.seeds):
        settings = (model_fingerprint, cell.task.fingerprint(), options.queries, sorted(cell.parameters().items()))
        fingerprint = hashlib.sha256(repr(settings).encode()).hexdigest()
        key = (cell.selection, options.model, cell.task.name, "test", cell.shots, cell.seed)
        record = writer.find(key, fingerprint)
        if record is None:
            record = measure(cell, options.model, options.queries, fingerprint)
            writer.append(record)
        records.append(record)
        milliseconds, tokens = 1000 * record.seconds / record.num_queries, record.query_tokens / record.num_queries
        print(
            f"{record.task} {record.shots} {record.method} seed {record.seed}: {record.metric} {record.value:.3f}, "
            f"{milliseconds:.1f} ms and {tokens:.0f} tokens a query",
            flush=True,
        )
    machine, rows = describe_machine(), summarise(records)
    write_json_atomic(options.output, {"model": options.model, "machine": machine, "results": rows})
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
