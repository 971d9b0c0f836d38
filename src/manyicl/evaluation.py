"""method x task x shots x seed -> records. A cell already on file is read, not computed again.

Demonstration orders are nested over shots and a pure function of (seed, task); queries are the first of the test split, in
file order, the same for every method, shot count and seed.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from manyicl.episodes import order_examples
from manyicl.errors import TaskError
from manyicl.methods import Answer, Method, OpenedMethod
from manyicl.metrics import aggregate, score_answer
from manyicl.records import CellKey, EvaluationRecord, QueryScores, RecordWriter, Shots
from manyicl.tasks.task import Example, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is evaluated on each task.

    Attributes:
        shots: Numbers of demonstrations, and `max` for all that fit.
        num_seeds: Orders of demonstrations.
        num_queries: Queries per task; all of a smaller test split.
        model: Name of the model, as it stands in the records.
        model_note: What must stand beside every result of it.
        versions: Library versions, as they stand in the records.
        condition: What `arrange` does, as it stands in the records.
        arrange: Turns the ordered demonstrations of a seed into others, before those that fit are taken.
    """

    shots: tuple[Shots, ...]
    num_seeds: int = 3
    num_queries: int = 100
    model: str = ""
    model_note: str = ""
    versions: tuple[tuple[str, str], ...] = ()
    condition: str = ""
    arrange: Callable[[list[Example], int], list[Example]] | None = None


def order_demonstrations(task: Task, seed: int) -> list[Example]:
    """The train examples in the order in which an evaluation puts them into the context; k shots are the first k."""
    return order_examples(task.train, seed=seed, purpose=f"demonstrations/{task.name}", index=0)


def evaluate_task(
    method: Method, task: Task, role: str, *, plan: Plan, writer: RecordWriter, seeds: Sequence[int] | None = None
) -> Iterator[EvaluationRecord]:
    """The records of one task, each on file before it is yielded; a shot count that does not fit is absent.

    Args:
        seeds: Those of the plan's orders that this process evaluates; None takes all.

    Raises:
        TaskError: the task has no test examples.
        RecordsError: the file holds these cells with another model or other settings.
    """
    queries = task.test[: plan.num_queries]
    if not queries:
        raise TaskError(f"task {task.name!r} has no test examples to evaluate on. Add a test file.")
    alone: EvaluationRecord | None = None  # Without demonstrations their order changes nothing: answered once.
    fingerprint = hashlib.sha256(f"{method.fingerprint}/{task.fingerprint()}/{len(queries)}".encode()).hexdigest()
    for seed in range(plan.num_seeds) if seeds is None else seeds:
        keys: dict[Shots, CellKey] = {
            shots: (method.name, plan.model, task.name, "test", shots, seed, plan.condition) for shots in plan.shots
        }
        found = {shots: writer.find(key, fingerprint) for shots, key in keys.items()}
        missing = [shots for shots, record in found.items() if record is None]
        alone = alone or found.get(0)
        yield from (record for record in found.values() if record is not None)
        if not missing or _only_unreachable(found, missing):
            continue
        start = time.perf_counter()
        order = order_demonstrations(task, seed)
        if plan.arrange is not None:
            order = plan.arrange(order, seed)
        opened = method.open(task, _needed(order, missing), queries)
        prefill_seconds = time.perf_counter() - start
        # `max` comes first: it says, on file, which larger shot counts do not fit.
        for shots in sorted(missing, key=lambda shots: shots != "max"):
            num_shots = opened.num_demonstrations if shots == "max" else shots
            if num_shots > opened.num_demonstrations:
                logger.info("%s %s: %d shots do not fit, %d do", plan.model, task.name, num_shots, opened.num_demonstrations)
                continue
            if shots == 0 and alone is not None:
                record = alone.model_copy(update={"seed": seed})
            else:
                record = _evaluate_cell(method, task, role, opened, queries, num_shots, shots=shots, seed=seed, plan=plan)
            alone = record if shots == 0 else alone
            record = record.model_copy(update={"fingerprint": fingerprint, "prefill_seconds": prefill_seconds})
            writer.append(record)
            logger.info(
                "%s %s shots=%s seed=%d: %.3f (%.0f s)",
                plan.model,
                task.name,
                shots,
                seed,
                record.value,
                record.seconds,
            )
            yield record


def _needed(order: Sequence[Example], shots: Sequence[Shots]) -> Sequence[Example]:
    """The front of the order that the largest shot count asks for."""
    return order if "max" in shots else order[: max(int(count) for count in shots)]


def _only_unreachable(found: dict[Shots, EvaluationRecord | None], missing: Sequence[Shots]) -> bool:
    """Whether every missing shot count is known not to fit, from the record of `max`."""
    most = found.get("max")
    return most is not None and all(isinstance(shots, int) and shots > most.num_demonstrations for shots in missing)


def _evaluate_cell(
    method: Method,
    task: Task,
    role: str,
    opened: OpenedMethod,
    queries: Sequence[Example],
    num_shots: int,
    *,
    shots: Shots,
    seed: int,
    plan: Plan,
) -> EvaluationRecord:
    start = time.perf_counter()
    answers = opened.answer(queries, num_shots)
    seconds = time.perf_counter() - start
    scores = _score_queries(task, queries, answers)
    return EvaluationRecord(
        method=method.name,
        model=plan.model,
        model_note=plan.model_note,
        task=task.name,
        family=task.family,
        role=role,
        split="test",
        metric=task.metric,
        shots=shots,
        num_demonstrations=num_shots,
        seed=seed,
        condition=plan.condition,
        value=aggregate(task.metric, scores.scores, scores.gold, scores.predicted),
        num_queries=len(queries),
        prefix_tokens=opened.prefix_tokens(num_shots),
        query_tokens=sum(opened.query_tokens(query) for query in queries),
        seconds=seconds,
        prefill_seconds=0.0,
        fingerprint="",
        versions=dict(plan.versions),
        queries=scores,
    )


def _score_queries(task: Task, queries: Sequence[Example], answers: Sequence[Answer]) -> QueryScores:
    scores, gold = [], []
    for query, answer in zip(queries, answers, strict=True):
        choices = task.choices(query)
        gold.append(choices.index(query.answer) if choices else -1)
        right = float(answer.choice == gold[-1])
        scores.append(right if choices else score_answer(task.metric, answer.text, (query.answer, *query.accepted)))
    return QueryScores(ids=list(range(len(queries))), scores=scores, gold=gold, predicted=[answer.choice for answer in answers])
