"""What a task's fields mean: its task.yaml, or a guess from the fields' names. Loads no torch."""

import json
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from manyicl.config import YAML_ERRORS, explain_validation
from manyicl.errors import TaskError
from manyicl.tasks.tables import TableRow, field_text, read_utf8, scalar_text
from manyicl.tasks.task import Family, Metric

_METRIC_NAMES: dict[str, Metric] = {
    "accuracy": "accuracy",
    "macro-F1": "macro_f1",
    "exact match + F1 (best over answers)": "token_f1",
    "ROUGE-L": "rouge_l",
    "ROUGE-L (best over references)": "rouge_l",
    "numeric exact match": "numeric_match",
}
_INPUT_FIELDS = (
    ("premise", "hypothesis"),
    ("passage", "question"),
    ("question", "choices"),
    *((name,) for name in ("question", "input", "dialogue", "document", "text", "sentence", "prompt")),
)
_ANSWER_FIELDS = ("label", "answer", "summary", "output", "completion", "target")
_ACCEPTED_FIELDS = ("answers", "references")
_OPTION_FIELDS = ("choices", "options")
GROUP_FIELDS = ("premise", "passage", "context")
_MAX_INFERRED_LABELS = 20


class HubSource(BaseModel):
    """A data set of the `datasets` hub."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="Hub id.")
    name: str | None = Field(None, description="Configuration of the data set.")
    revision: str | None = Field(None, description="Commit or tag; fixes what is read.")
    train_split: str = Field("train", description="Split that demonstrations and training come from.")
    test_split: str = Field("test", description="Split that queries come from.")
    skip: dict[str, list[str]] = Field(
        default_factory=dict, description="Fields, and the values whose rows are left out; an empty text means no value."
    )
    shuffle_seed: int | None = Field(None, ge=0, description="Seed that rows are shuffled with; None keeps their order.")
    max_rows: int | None = Field(None, ge=1, description="Rows of each split that are read, at most, after shuffling.")


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
    options: str | list[str] | None = Field(
        None, description="Field that holds this example's choices, as a list, or the fields that hold one each."
    )
    option_keys: str | list[str] | None = Field(
        None, description="What the answer field holds for each choice: a field with a list, or the keys themselves."
    )
    accepted: str | None = Field(None, description="Field that holds all accepted answers, as a list.")
    group: str | None = Field(None, description="Field that train and test must not share, such as a passage.")
    max_answer_tokens: int | None = Field(None, ge=1, description="Tokens in a generated answer, at most.")
    hub: HubSource | None = Field(None, description="Data set of the hub, in place of files.")

    @field_validator("input")
    @classmethod
    def _check_template(cls, template: str) -> str:
        if not any(name is not None for _, name in split_template(template)):
            raise ValueError("names no field, so that every input would be the same. Write fields in braces: {input}.")
        return template

    @field_validator("option_keys", mode="before")
    @classmethod
    def _read_option_keys(cls, keys: Any, info: ValidationInfo) -> Any:
        if keys and not info.data.get("options"):
            raise ValueError("stands for choices, and there are none. Name their field in `options`.")
        return [scalar_text(key) for key in keys] if isinstance(keys, list) else keys

    @field_validator("labels", mode="before")
    @classmethod
    def _read_labels(cls, labels: Any) -> Any:
        if isinstance(labels, dict):
            return {scalar_text(raw): _label_text(word) for raw, word in labels.items()}
        if not isinstance(labels, list):
            return labels
        words = [_label_text(word) for word in labels]
        twice = [word for place, word in enumerate(words) if word in words[:place]]
        if twice:
            raise ValueError(f"label {twice[0]!r} is listed twice. List each label once.")
        return words


def split_template(template: str) -> list[tuple[str, str | None]]:
    """The pieces of an input template: text and the name of the field that follows it, None after the last text.

    Raises:
        ValueError: a brace is not closed, or a place holds more than the name of a field.
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"is no valid template ({error}). Write fields as {{input}}, and braces of the text twice.") from error
    for _, name, details, conversion in pieces:
        if name == "" or details or conversion:
            raise ValueError("has a place that is not just the name of a field. Write {input}, and braces of the text twice.")
    return [(text, name) for text, name, _, _ in pieces]


def input_template(fields: Iterable[str]) -> str | None:
    """The template for the first known set of input fields among `fields`; None where there is none."""
    present = set(fields)
    names = next((names for names in _INPUT_FIELDS if present.issuperset(names)), ())
    if len(names) == 1:
        return f"{{{names[0]}}}"
    return "\n".join(f"{name.capitalize()}: {{{name}}}" for name in names) or None


def fill_template(template: str, row: TableRow) -> str:
    """The input that a row holds.

    Raises:
        RowError: a field is missing or no text.
    """
    return "".join(text + ("" if name is None else field_text(row, name)) for text, name in split_template(template))


def _label_text(word: Any) -> Any:
    """A label word of a task.yaml."""
    if isinstance(word, bool):
        raise ValueError(f"holds the truth value {word}, which YAML reads from yes, no, on, off, true and false. Quote it.")
    text = scalar_text(word)
    if isinstance(text, str) and not text.strip():
        raise ValueError("holds an empty label. Name every label.")
    return text.strip() if isinstance(text, str) else text


def read_task_file(path: Path) -> TaskFile:
    """The contents of a task.yaml.

    Raises:
        TaskError: not UTF-8, no valid YAML, an unknown key (the nearest is named), or a value of the wrong kind.
    """
    try:
        content = yaml.safe_load(read_utf8(path))
    except YAML_ERRORS as error:
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
    template = input_template(fields)
    answer = next((name for name in _ANSWER_FIELDS if name in fields), None)
    if template is None or answer is None:
        raise TaskError(
            f"{rows[0].source}: cannot tell input and answer among the fields {', '.join(fields)}. Write a task.yaml with "
            "`input` (a template) and `answer` (a field)."
        )
    manifest = _read_manifest(folder)
    options = next((name for name in _OPTION_FIELDS if any(row.fields.get(name) for row in rows)), None)
    labels = manifest.get("labels")
    metric = _METRIC_NAMES.get(str(manifest.get("metric")), "accuracy")
    if not labels and not options and metric in ("accuracy", "macro_f1"):
        given = (scalar_text(row.fields.get(answer)) for row in rows)
        answers = Counter(value.strip() for value in given if isinstance(value, str) and value.strip())
        labels = sorted(answers) if looks_like_labels(answers) else None
    try:
        return TaskFile(
            name=folder.resolve().name,
            family=manifest.get("family", "classification"),
            metric=metric if manifest or labels or options else "token_f1",
            input=template,
            answer=answer,
            labels=labels,
            options=options,
            accepted=next((name for name in _ACCEPTED_FIELDS if name in all_fields), None),
        )
    except ValidationError as error:
        raise TaskError(explain_validation(error, TaskFile, where=str(folder.parent / "MANIFEST.json"))) from error


def describe_guess(description: TaskFile) -> str:
    """A sentence on how a folder without a task.yaml was read."""
    kind = f"{len(description.labels)} labels" if description.labels else "options" if description.options else "free text"
    return (
        f"read as family {description.family}, input {description.input!r}, answer {description.answer!r} ({kind}), "
        f"metric {description.metric}"
    )


def looks_like_labels(answers: Mapping[str, int]) -> bool:
    """Whether few distinct answers recur, as labels do."""
    return 0 < len(answers) <= _MAX_INFERRED_LABELS and min(answers.values()) > 1


def _read_manifest(folder: Path) -> dict[str, Any]:
    """What a MANIFEST.json beside the folder says of the task; empty where there is none."""
    path = folder.parent / "MANIFEST.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_utf8(path))
    except ValueError as error:
        raise TaskError(f"{path}: broken JSON: {error}") from error
    entries = content if isinstance(content, list) else []
    return next((entry for entry in entries if isinstance(entry, dict) and entry.get("name") == folder.resolve().name), {})
