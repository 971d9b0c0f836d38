"""Tasks and suites from folders, files and the datasets hub. Loads no torch.

    my_task/                             suite/
      task.yaml   what the fields mean     suite.yaml (or SPLIT.json)   which tasks have which role
      train.jsonl (or .csv, .parquet)      my_task/  other_task/ …
      test.jsonl  (may be absent)

Without a task.yaml the fields are inferred from their names, and the guess is logged.
"""

import json
import logging
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manyicl.config import explain_validation
from manyicl.errors import TaskError
from manyicl.tasks.tables import TableRow, find_table, read_table, read_utf8
from manyicl.tasks.task import Example, Family, Metric, Task, TaskSuite

logger = logging.getLogger(__name__)

_METRIC_NAMES: dict[str, Metric] = {
    "accuracy": "accuracy",
    "macro-F1": "macro_f1",
    "exact match + F1 (best over answers)": "token_f1",
    "ROUGE-L": "rouge_l",
    "ROUGE-L (best over references)": "rouge_l",
    "numeric exact match": "numeric_match",
}
_INPUT_FIELDS = (("premise", "hypothesis"), ("passage", "question"), ("question", "choices"), ("question",), ("input",))
_DOCUMENT_FIELDS = (("dialogue",), ("document",), ("text",), ("sentence",), ("prompt",))
_ANSWER_FIELDS = ("label", "answer", "summary", "output", "completion", "target")
_ACCEPTED_FIELDS = ("answers", "references")
_MAX_INFERRED_LABELS = 20


class HubSource(BaseModel):
    """A data set of the `datasets` hub."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="Hub id.")
    name: str | None = Field(None, description="Configuration of the data set.")
    revision: str | None = Field(None, description="Commit or tag; fixes what is read.")
    train_split: str = Field("train", description="Split that demonstrations and training come from.")
    test_split: str = Field("test", description="Split that queries come from.")


class TaskFile(BaseModel):
    """What a task.yaml holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = Field(None, description="Name of the task; None takes the folder's.")
    family: Family = Field("classification", description="Family that results are averaged in.")
    metric: Metric = Field("accuracy", description="How an answer is judged.")
    instruction: str = Field("", description="Sentence placed once before the demonstrations.")
    input: str = Field(description="Template of the input, with {field} places.")
    answer: str = Field(description="Field that holds the answer.")
    labels: list[str] | dict[str, str] | None = Field(None, description="Label words, or raw values and their label words.")
    options: str | None = Field(None, description="Field that holds this example's choices, as a list.")
    accepted: str | None = Field(None, description="Field that holds all accepted answers, as a list.")
    group: str | None = Field(None, description="Field that train and test must not share, such as a passage.")
    max_answer_tokens: int | None = Field(None, ge=1, description="Tokens in a generated answer, at most.")
    hub: HubSource | None = Field(None, description="Data set of the hub, in place of files.")


def load_task(path: Path | str, *, name: str | None = None) -> Task:
    """The task in a folder, or in one JSONL file of MetaICL's or of chat messages.

    Raises:
        TaskError: something is missing or wrong; file, line and field are named.
    """
    path = Path(path)
    if path.is_file():
        return task_of_examples(read_examples(path), name=name or path.stem)
    if not path.is_dir():
        raise TaskError(f"{path}: no such folder. Give a task's folder, with train.jsonl and, better, task.yaml.")
    description_file = path / "task.yaml"
    if description_file.is_file():
        description = read_task_file(description_file)
        tables = _read_hub(description.hub, path) if description.hub else _read_files(path)
    else:
        tables = _read_files(path)
        description = infer_task_file(path, tables["train"], tables["test"])
        logger.info("%s: no task.yaml; %s", path, describe_guess(description))
    splits = {split: tuple(make_example(row, description) for row in tables.get(split, [])) for split in ("train", "test")}
    return _finish_task(name or description.name or path.name, description, splits["train"], splits["test"], str(path))


def load_suite(path: Path | str) -> TaskSuite:
    """A suite: `builtin`, or a folder of task folders with roles in suite.yaml or SPLIT.json.

    Raises:
        TaskError: a task or a role is wrong.
    """
    if str(path) == "builtin":
        from manyicl.tasks.builtin import load_builtin_suite

        return load_builtin_suite()
    folder = Path(path)
    if not folder.is_dir():
        raise TaskError(f"{folder}: no such folder. Give `builtin` or the folder of a suite.")
    if (folder / "task.yaml").is_file() or find_table(folder, "train"):
        task = load_task(folder)
        return TaskSuite(task.name, {task.name: task}, held_out=(task.name,))
    roles = _read_roles(folder)
    names = [name for role in roles.values() for name in role]
    if not names:
        names = sorted(child.name for child in folder.iterdir() if (child / "task.yaml").is_file() or find_table(child, "train"))
    if not names:
        raise TaskError(f"{folder}: holds no task. Each task is a sub-folder with train.jsonl (or .csv, .parquet).")
    tasks = {name: load_task(folder / name) for name in dict.fromkeys(names)}
    return TaskSuite(folder.name, tasks, **roles)


def read_task_file(path: Path) -> TaskFile:
    """The contents of a task.yaml.

    Raises:
        TaskError: no valid YAML, an unknown key (the nearest is named), or a value of the wrong kind.
    """
    try:
        content = yaml.safe_load(read_utf8(path))
    except yaml.YAMLError as error:
        raise TaskError(f"{path}: no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise TaskError(f"{path}: holds a {type(content).__name__}; a task is a mapping of keys to values.")
    try:
        return TaskFile.model_validate(content)
    except ValidationError as error:
        raise TaskError(explain_validation(error, TaskFile, where=str(path))) from error


def infer_task_file(folder: Path, rows: Sequence[TableRow], test_rows: Sequence[TableRow] = ()) -> TaskFile:
    """A guess of what a folder's fields mean, from their names and, where there is one, the MANIFEST.json beside it.

    Raises:
        TaskError: no known pair of input and answer fields.
    """
    fields = rows[0].fields
    all_fields = fields.keys() | (test_rows[0].fields.keys() if test_rows else set())
    inputs = next((names for names in _INPUT_FIELDS + _DOCUMENT_FIELDS if all(name in fields for name in names)), None)
    answer = next((name for name in _ANSWER_FIELDS if name in fields), None)
    if inputs is None or answer is None:
        raise TaskError(
            f"{rows[0].source}: cannot tell input and answer among the fields {', '.join(fields)}. Write a task.yaml with "
            "`input` (a template) and `answer` (a field)."
        )
    manifest = _read_manifest(folder)
    options = "choices" if "choices" in fields else None
    labels = manifest.get("labels")
    metric = _METRIC_NAMES.get(manifest.get("metric", ""), "accuracy")
    answers = Counter(str(row.fields.get(answer)) for row in rows)
    if not labels and not options and metric in ("accuracy", "macro_f1") and _looks_like_labels(answers):
        labels = sorted(answers)
    template = f"{{{inputs[0]}}}" if len(inputs) == 1 else "\n".join(f"{name.capitalize()}: {{{name}}}" for name in inputs)
    return TaskFile(
        name=folder.name,
        family=manifest.get("family", "classification"),
        metric=metric if manifest or labels or options else "token_f1",
        input=template,
        answer=answer,
        labels=labels,
        options=options,
        accepted=next((name for name in _ACCEPTED_FIELDS if name in all_fields), None),
        group=next((name for name in ("premise", "passage") if name in inputs), None),
    )


def describe_guess(description: TaskFile) -> str:
    """A sentence on how a folder without a task.yaml was read."""
    kind = f"{len(description.labels)} labels" if description.labels else "options" if description.options else "free text"
    return (
        f"read as family {description.family}, input {description.input!r}, answer {description.answer!r} ({kind}), "
        f"metric {description.metric}"
    )


def _looks_like_labels(answers: Mapping[str, int]) -> bool:
    """Whether few distinct answers recur, as labels do."""
    return len(answers) <= _MAX_INFERRED_LABELS and min(answers.values()) > 1


def make_example(row: TableRow, description: TaskFile) -> Example:
    """The example that a row holds.

    Raises:
        TaskError: a field is missing or empty; file, line and the fields present are named.
    """
    template_fields = [name for _, name, _, _ in string.Formatter().parse(description.input) if name is not None]
    values = {name: _text(_field(row, name)) for name in template_fields}
    raw = _text(_field(row, description.answer))
    if not raw:
        raise TaskError(f"{row.source}: the answer field {description.answer!r} is empty. Fill it in or remove the row.")
    accepted = _field(row, description.accepted) if description.accepted and description.accepted in row.fields else ()
    options = _field(row, description.options) if description.options else ()
    answer = raw
    if isinstance(description.labels, dict):
        answer = _label_word(row, raw, description.labels)
    elif description.labels and raw not in description.labels:
        raise TaskError(
            f"{row.source}: label {raw!r} is not among the {len(description.labels)} labels "
            f"({', '.join(description.labels[:10])}{', …' if len(description.labels) > 10 else ''}). Correct it or list it."
        )
    choices = tuple(_text(option) for option in options)
    if choices and answer not in choices:
        raise TaskError(f"{row.source}: answer {answer!r} is not among its options {list(choices)}. Correct the row.")
    return Example(
        input=description.input.format(**values),
        answer=answer,
        accepted=tuple(text for text in map(_text, accepted) if text != answer),
        options=choices,
        group=_text(_field(row, description.group)) if description.group else "",
        source=row.source,
    )


def _label_word(row: TableRow, raw: str, labels: Mapping[str, str]) -> str:
    if raw not in labels:
        raise TaskError(
            f"{row.source}: raw label {raw!r} is not mapped to a word (mapped: {', '.join(labels)}). Add it to `labels`."
        )
    return labels[raw]


def _field(row: TableRow, name: str) -> Any:
    if name not in row.fields or row.fields[name] is None:
        raise TaskError(
            f"{row.source}: field {name!r} is missing (there: {', '.join(row.fields)}). Correct the row or the task.yaml."
        )
    return row.fields[name]


def _text(value: Any) -> str:
    """A field as text: lists joined by "; ", numbers written out, ends stripped."""
    return "; ".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value).strip()


def _read_files(folder: Path) -> dict[str, list[TableRow]]:
    train = find_table(folder, "train")
    if train is None:
        raise TaskError(f"{folder}: has no train.jsonl, train.csv or train.parquet. Put the labelled examples there.")
    test = find_table(folder, "test")
    return {"train": read_table(train), "test": read_table(test) if test else []}


def _read_hub(hub: HubSource, folder: Path) -> dict[str, list[TableRow]]:
    import datasets

    tables = {}
    for split, source in (("train", hub.train_split), ("test", hub.test_split)):
        try:
            data = datasets.load_dataset(hub.path, hub.name, revision=hub.revision, split=source)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise TaskError(f"{folder / 'task.yaml'}: {hub.path} split {source!r} cannot be loaded: {error}") from error
        tables[split] = [TableRow(dict(row), f"{hub.path}/{source}:{number}") for number, row in enumerate(data, 1)]
    return tables


def _finish_task(name: str, description: TaskFile, train: tuple[Example, ...], test: tuple[Example, ...], where: str) -> Task:
    """A task whose label set is complete and whose test labels were all seen in train."""
    if len(train) < 2:
        raise TaskError(f"{where}: {len(train)} train example(s); a task needs at least 2. Add labelled examples.")
    labels: tuple[str, ...] = ()
    if description.labels:
        words = description.labels.values() if isinstance(description.labels, dict) else description.labels
        labels = tuple(dict.fromkeys(words))
        seen = {example.answer for example in train}
        for example in test:
            if example.answer not in seen:
                raise TaskError(
                    f"{example.source}: test label {example.answer!r} never occurs in train. Add an example of it, or drop the row."
                )
    return Task(
        name=name,
        family=description.family,
        metric=description.metric,
        train=train,
        test=test,
        labels=labels,
        instruction=description.instruction,
        max_answer_tokens=description.max_answer_tokens,
    )


def _read_roles(folder: Path) -> dict[str, tuple[str, ...]]:
    """The roles in suite.yaml or SPLIT.json; empty where there is neither."""
    if (folder / "suite.yaml").is_file():
        content = yaml.safe_load(read_utf8(folder / "suite.yaml"))
        keys = {"meta_training": "meta_training", "validation": "validation", "held_out": "held_out"}
    elif (folder / "SPLIT.json").is_file():
        content = json.loads(read_utf8(folder / "SPLIT.json"))
        keys = {"meta_training": "meta_training", "validation": "validation_tasks", "held_out": "held_out"}
    else:
        return {}
    return {role: tuple(content.get(key) or ()) for role, key in keys.items()}


def _read_manifest(folder: Path) -> dict[str, Any]:
    """What a MANIFEST.json beside the folder says of the task; empty where there is none."""
    path = folder.parent / "MANIFEST.json"
    if not path.is_file():
        return {}
    entries = [entry for entry in json.loads(read_utf8(path)) if entry.get("name") == folder.name]
    return dict(entries[0]) if entries else {}


def task_of_examples(examples: Sequence[Example], *, name: str) -> Task:
    """A task without a test split from labelled examples; answers that recur are its label set.

    Raises:
        TaskError: there are fewer than two examples.
    """
    answers = Counter(example.answer for example in examples)
    is_choice = bool(examples) and bool(examples[0].options)
    labels = sorted(answers) if examples and not is_choice and _looks_like_labels(answers) else None
    metric: Metric = "accuracy" if labels or is_choice else "token_f1"
    description = TaskFile(input="{input}", answer="answer", labels=labels, metric=metric)
    return _finish_task(name, description, tuple(examples), (), name)


def read_examples(path: Path | str) -> tuple[Example, ...]:
    """Labelled examples in one file: chat messages, MetaICL's rows, or a table with input and answer columns.

    A chat row is {"messages": [{"role", "content", "loss"?}, …]}: each assistant message whose `loss` is not 0 is an answer, and
    the messages since the answer before it are its input.

    Raises:
        TaskError: a row is of no known shape; file, line and fields are named.
    """
    path = Path(path)
    rows = read_table(path)
    if "messages" in rows[0].fields:
        examples = tuple(example for row in rows for example in _chat_examples(row))
    elif {"input", "output"} <= rows[0].fields.keys():
        description = TaskFile(input="{input}", answer="output", options="options" if rows[0].fields.get("options") else None)
        examples = tuple(make_example(row, description) for row in rows)
    else:
        description = infer_task_file(path.parent / path.stem, rows).model_copy(update={"labels": None})
        examples = tuple(make_example(row, description) for row in rows)
    if not examples:
        raise TaskError(f"{path}: {len(rows)} row(s) hold no answer to learn from. Give assistant messages whose loss is not 0.")
    return examples


def _chat_examples(row: TableRow) -> list[Example]:
    examples: list[Example] = []
    pending: list[str] = []
    messages = row.fields["messages"]
    if not isinstance(messages, list):
        raise TaskError(f"{row.source}: `messages` holds a {type(messages).__name__}, not a list.")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or not isinstance(message.get("content"), str):
            raise TaskError(f"{row.source}: message {number} needs a `role` and a text `content`.")
        content = message["content"].strip()
        if message["role"] != "assistant":
            pending.append(content)
        elif message.get("loss", 1):
            if not content or not pending:
                raise TaskError(f"{row.source}: message {number} is an answer without text or without an input before it.")
            examples.append(Example("\n".join(pending), content, source=row.source))
            pending = []
        else:
            pending.append(content)
    return examples


def read_queries(path: Path | str) -> list[str]:
    """The inputs of a file whose answers are wanted; answer columns, if any, are not read.

    Raises:
        TaskError: a row has no known input field.
    """
    rows = read_table(Path(path))
    for names in _INPUT_FIELDS + _DOCUMENT_FIELDS:
        if all(name in rows[0].fields for name in names):
            if len(names) == 1:
                return [_text(_field(row, names[0])) for row in rows]
            return ["\n".join(f"{name.capitalize()}: {_text(_field(row, name))}" for name in names) for row in rows]
    raise TaskError(f"{rows[0].source}: no input field among {', '.join(rows[0].fields)}. Name the column `input`.")
