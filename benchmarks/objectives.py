"""All answers against the last answer at equal training seconds: python benchmarks/objectives.py --output FILE

Two objectives on the same many-shot rows of 2,048 tokens, one row an update, the same learning rates for both; what differs is
which answers are targets. A few updates of each are timed first, and the number of updates of `last_answer` is chosen so that
both train for the same seconds. Every model is then read on the validation tasks (no held-out task is touched) with three orders
of demonstrations, and each objective counts at its best rate on these very tasks.

The interval is a percentile bootstrap over queries, of the difference of the two models' scores on the same query, means over
orders and shot counts; one training seed, whose spread it does not hold. Every step goes on where it was stopped.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from foundation import Bench
from machine import describe_machine

from manyicl.files import write_json_atomic
from manyicl.metrics import bootstrap_interval
from manyicl.records import EvaluationRecord, read_records

RECIPE = "recipes/real.yaml"
OBJECTIVES = ("all_answers", "last_answer")
RATES = (2.0e-4, 6.0e-4, 2.0e-3)
TIMED_UPDATES = 6
SHOTS = "0,4,16,64"


def train(bench: Bench, name: str, objective: str, rate: float, num_steps: int, arguments: argparse.Namespace) -> Path:
    """The folder of a finished run."""
    output = arguments.work / name
    overrides = [
        f"tasks={arguments.tasks}",
        f"output={output}",
        f"objective.name={objective}",
        f"training.learning_rate={rate:g}",
    ]
    overrides += [f"training.num_steps={num_steps}", f"training.save_every={num_steps}", "training.validate_checkpoints=false"]
    bench.run(name, ["manyicl", "train", RECIPE, *overrides, "--resume"])
    return output


def evaluate(bench: Bench, run: Path, arguments: argparse.Namespace) -> list[EvaluationRecord]:
    """The records of a run on the validation tasks."""
    path = arguments.work / f"{run.name}.jsonl"
    options = ["--tasks", arguments.tasks, "--role", "validation", "--shots", SHOTS, "--seeds", "3"]
    options += ["--queries", str(arguments.queries), "--output", str(path)]
    bench.run(f"evaluate-{run.name}", ["manyicl", "evaluate", "--model", str(run), *options])
    return read_records(path)


def seconds_per_update(run: Path) -> float:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return float(summary["seconds"] / summary["updates"])


def query_scores(records: list[EvaluationRecord]) -> np.ndarray:
    """Mean score of each query over orders and shot counts, task by task: [queries]."""
    tasks = sorted({record.task for record in records})
    return np.concatenate(
        [np.mean([record.queries.scores for record in records if record.task == task], axis=0) for task in tasks]
    )


def by_shots(records: list[EvaluationRecord]) -> dict[str, float]:
    """Mean over tasks and orders at each number of shots, 0-100."""
    shots = list(dict.fromkeys(str(record.shots) for record in records))
    return {count: 100 * float(np.mean([r.value for r in records if str(r.shots) == count])) for count in shots}


def main() -> None:
    """Time, train, evaluate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="../shared/data", help="a suite with validation tasks")
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--updates", type=int, default=100, help="updates of all_answers")
    parser.add_argument("--queries", type=int, default=200, help="queries per task")
    parser.add_argument("--output", type=Path, default=Path("runs/objectives.json"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.work)
    timed = {
        objective: seconds_per_update(train(bench, f"timed-{objective}", objective, 1e-6, TIMED_UPDATES, arguments))
        for objective in OBJECTIVES
    }
    updates = {objective: round(arguments.updates * timed["all_answers"] / timed[objective]) for objective in OBJECTIVES}
    found: dict[str, list[EvaluationRecord]] = {}
    for rate in RATES:
        for objective in OBJECTIVES:
            name = f"{objective}-{rate:g}-{updates[objective]}"
            run = train(bench, name, objective, rate, updates[objective], arguments)
            found[f"{objective}-{rate:g}"] = evaluate(bench, run, arguments)
    best = {
        objective: max((f"{objective}-{rate:g}" for rate in RATES), key=lambda name: float(query_scores(found[name]).mean()))
        for objective in OBJECTIVES
    }
    difference = 100 * (query_scores(found[best["all_answers"]]) - query_scores(found[best["last_answer"]]))
    mean, (low, high) = float(difference.mean()), bootstrap_interval(difference, draw=np.random.default_rng(0))
    result: dict[str, Any] = {
        "difference": {"points": mean, "low": low, "high": high, "queries": len(difference), "best": best},
        "by_shots": {name: by_shots(records) for name, records in found.items()},
        "seconds_per_update": timed,
        "updates": updates,
        "queries_a_task": arguments.queries,
        "commands": bench.commands,
        "machine": describe_machine(),
        "seed": 0,
    }
    write_json_atomic(arguments.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
