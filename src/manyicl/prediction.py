"""Labelled examples and queries -> answers, end to end and without tuning."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from manyicl.engines.native import check_format, open_engine
from manyicl.episodes import order_examples
from manyicl.errors import TaskError
from manyicl.files import write_text_atomic
from manyicl.methods import Answer, CalibratedInContext, InContext
from manyicl.modeling import LoadedModel, load_model
from manyicl.tasks.readers import load_task, read_examples, read_queries, task_of_examples
from manyicl.tasks.task import Example, Task


def predict(
    model: str | Path | LoadedModel,
    demonstrations: Task | Sequence[Example],
    queries: Sequence[str | Example],
    *,
    seed: int = 0,
    context_tokens: int | None = None,
    format: str | None = None,
    calibrate: bool = False,
) -> tuple[list[Answer], int]:
    """Answers to queries from labelled examples, and how many of the examples fitted the context.

    Args:
        demonstrations: A task, whose train examples, labels and instruction are used; or examples, whose recurring answers are
            taken as a label set and whose own options are not looked at. Without labels or options text is generated.
        queries: Inputs; as examples where each has options of its own.
        context_tokens: Tokens that demonstrations, query and answer may have together; None takes the model's positions.
        format: plain or chat; None takes the format that the model was tuned in.
        calibrate: Correct label scores by what they are after inputs of random words of the demonstrations; see
            `CalibratedInContext`. Such scores are no log-probabilities, and answers have none.

    Raises:
        UserInputError: the examples, a query or the model are wrong, or there are no labels to calibrate.
    """
    check_format(format)
    if isinstance(demonstrations, Task):
        task = demonstrations
    else:
        task = task_of_examples([replace(example, options=()) for example in demonstrations], name="task")
    if calibrate and not task.labels:
        kind = "options of its own for each query" if task.is_choice else "free text"
        raise TaskError(f"task {task.name!r} has {kind} and no labels, whose scores alone are calibrated. Leave calibration out.")
    if not queries:
        return [], 0
    asked = tuple(Example(query, "") if isinstance(query, str) else query for query in queries)
    for number, query in enumerate(asked):
        if task.is_choice and not task.choices(query):
            raise TaskError(
                f"query {number} ({query.source or query.input[:40]!r}) has no options, as the examples of task {task.name!r} "
                "have. Give it its choices."
            )
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    engine = open_engine(loaded, format, context_tokens)
    method = CalibratedInContext(engine, seed=seed) if calibrate else InContext(engine)
    order = order_examples(task.train, seed=seed, purpose="demonstrations", index=0)
    opened = method.open(task, order, asked)
    return opened.answer(asked, opened.num_demonstrations), opened.num_demonstrations


def predict_file(
    model: str,
    demonstrations: Path,
    queries: Path,
    output: Path,
    *,
    seed: int = 0,
    context_tokens: int | None = None,
    format: str | None = None,
    calibrate: bool = False,
) -> tuple[int, int, int]:
    """Answer the queries of a file from labelled examples; writes one JSON line per query.

    Args:
        demonstrations: A task's folder, whose task.yaml says what the fields of both mean; or a file of examples.

    Returns:
        Demonstrations used, demonstrations given, answers written.

    Raises:
        UserInputError: a file or the model is wrong; nothing is written.
    """
    examples: Task | tuple[Example, ...]
    if demonstrations.is_dir():
        examples = load_task(demonstrations)
        asked, num_given = read_queries(queries, folder=demonstrations), len(examples.train)
    else:
        examples, asked = read_examples(demonstrations), read_queries(queries)
        num_given = len(examples)
    answers, num_used = predict(
        model, examples, asked, seed=seed, context_tokens=context_tokens, format=format, calibrate=calibrate
    )
    lines = []
    for query, answer in zip(asked, answers, strict=True):
        row: dict[str, object] = {"input": query.input, "answer": answer.text}
        if not math.isnan(answer.log_probability):
            row["log_probability"] = answer.log_probability
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text_atomic(output, "".join(lines))
    return num_used, num_given, len(lines)
