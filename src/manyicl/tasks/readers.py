"""Tasks and suites from folders, files and the datasets hub. Loads no torch.

    my_task/                             suite/
      task.yaml   what the fields mean     suite.yaml (or SPLIT.json)   which tasks have which role
      train.jsonl (or .csv, .parquet)      my_task/  other_task/ …
      test.jsonl  (may be absent)

Without a task.yaml the fields are inferred from their names, and the guess is logged. The first wrong row is an error; who
wants them all hands in a list of problems (see `tables`), and gets the task without those rows.
"""

import difflib
import json
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import yaml

from manyicl.config import YAML_ERRORS
from manyicl.errors import TaskError
from manyicl.tasks.descriptions import (
    GROUP_FIELDS,
    HubSource,
    TaskFile,
    describe_guess,
    fill_template,
    infer_task_file,
    input_template,
    looks_like_labels,
    read_task_file,
    split_template,
)
from manyicl.tasks.tables import (
    RowError,
    TableRow,
    field_text,
    field_text_or_empty,
    field_texts,
    find_mixed_types,
    find_table,
    has_column,
    raise_or_add,
    read_table,
    read_utf8,
)
from manyicl.tasks.task import Example, Metric, Role, Task, TaskSuite

logger = logging.getLogger(__name__)


def load_task(path: Path | str, *, name: str | None = None, problems: list[RowError] | None = None) -> Task:
    """The task in a folder, or in one JSONL file of MetaICL's or of chat messages.

    Raises:
        TaskError: something is missing or wrong; file, line and field are named.
    """
    path = Path(path)
    if path.is_file():
        return task_of_examples(
            read_examples(path, problems=problems), name=name or path.stem, where=str(path), problems=problems
        )
    if not path.is_dir():
        raise TaskError(f"{path}: no such folder. Give a task's folder, with train.jsonl and, better, task.yaml.")
    given = read_task_file(path / "task.yaml") if (path / "task.yaml").is_file() else None
    tables = _read_hub(given.hub, path) if given and given.hub else _read_files(path, problems)
    description = given or _infer(path, tables["train"], tables["test"])
    if problems is not None:
        problems += find_mixed_types([row for rows in tables.values() for row in rows])
    train, test = (_make_examples(tables[split], description, problems) for split in ("train", "test"))
    name = name or (description and description.name) or path.resolve().name
    if description is None:
        return task_of_examples(train, name=name, test=test, where=str(path), problems=problems)
    return _finish_task(name, description, train, test, where=str(path), problems=problems)


def load_suite(path: Path | str, *, problems: list[RowError] | None = None) -> TaskSuite:
    """A suite: `builtin`, or a folder of task folders with roles in suite.yaml or SPLIT.json; a single task is held out.

    Raises:
        TaskError: a task or a role is wrong.
    """
    if str(path) == "builtin":
        from manyicl.tasks.builtin import load_builtin_suite

        return load_builtin_suite()
    folder = Path(path)
    if not folder.exists():
        raise TaskError(f"{folder}: no such folder. Give `builtin` or the folder of a suite.")
    if folder.is_file() or (folder / "task.yaml").is_file() or find_table(folder, "train"):
        task = load_task(folder, problems=problems)
        return TaskSuite(task.name, {task.name: task}, held_out=(task.name,))
    roles = _read_roles(folder)
    folders = [name for names in roles.values() for name in names]
    if not folders:
        folders = sorted(
            child.name for child in folder.iterdir() if (child / "task.yaml").is_file() or find_table(child, "train")
        )
    if not folders:
        raise TaskError(f"{folder}: holds no task. Each task is a sub-folder with train.jsonl (or .csv, .parquet).")
    loaded = {name: load_task(folder / name, problems=problems) for name in dict.fromkeys(folders)}
    tasks: dict[str, Task] = {}
    for name, task in loaded.items():
        if task.name in tasks:
            raise TaskError(
                f"{folder / name}: another task of the suite is named {task.name!r} too. Change `name` in a task.yaml."
            )
        tasks[task.name] = task
    named = {role: tuple(loaded[name].name for name in names) for role, names in roles.items()}
    return TaskSuite(folder.resolve().name, tasks, **named)


def _infer(folder: Path, rows: Sequence[TableRow], test_rows: Sequence[TableRow] = ()) -> TaskFile | None:
    """A logged guess of what the fields mean; None for chat messages.

    Raises:
        TaskError: see `infer_task_file`; or no row could be read.
    """
    if not rows:
        raise TaskError(f"{folder}: no row of its examples could be read. Mend the file.")
    if "messages" in rows[0].fields:
        logger.info("%s: read as chat messages, each assistant message whose loss is not 0 as an answer", folder)
        return None
    description = infer_task_file(folder, rows, test_rows)
    logger.info("%s: no task.yaml; %s", folder, describe_guess(description))
    return description


def _make_examples(
    rows: Sequence[TableRow], description: TaskFile | None, problems: list[RowError] | None
) -> tuple[Example, ...]:
    """The examples of rows; without a description the rows are chats."""
    examples: list[Example] = []
    for row in rows:
        try:
            examples += _chat_examples(row) if description is None else [make_example(row, description)]
        except RowError as error:
            raise_or_add(error, problems)
    return tuple(examples)


def make_example(row: TableRow, description: TaskFile) -> Example:
    """The example that a row holds.

    Raises:
        RowError: a field is missing, empty or of no use; file, line and the fields present are named.
    """
    answer = field_text(row, description.answer)
    if not answer:
        problem = f"the answer field {description.answer!r} is empty. Fill it in or remove the row."
        raise RowError(row.source, "empty answer", problem)
    if isinstance(description.labels, dict):
        if answer not in description.labels:
            problem = f"raw label {answer!r} is not mapped to a word (mapped: {_few(description.labels)}). Add it to `labels`."
            raise RowError(row.source, "unknown label", problem)
        answer = description.labels[answer]
    elif description.labels and answer not in description.labels:
        problem = f"label {answer!r} is not among the {len(description.labels)} labels ({_few(description.labels)})."
        raise RowError(row.source, "unknown label", f"{problem} Correct it or list it.")
    options = _option_texts(row, description)
    if description.option_keys:
        answer = _keyed_option(answer, options, row, description.option_keys)
    if description.options and answer not in options:
        problem = f"answer {answer!r} is not among its options {list(options)}. Correct the row."
        raise RowError(row.source, "unknown label", problem)
    accepted = field_texts(row, description.accepted) if description.accepted and has_column(row, description.accepted) else ()
    names = [name for _, name in split_template(description.input)]
    group = description.group or next((name for name in GROUP_FIELDS if name in names), None)
    return Example(
        input=fill_template(description.input, row),
        answer=answer,
        accepted=tuple(text for text in accepted if text != answer),
        options=_shown_options(options, description),
        group=field_text(row, group) if group else "",
        source=row.source,
    )


def _option_texts(row: TableRow, description: TaskFile) -> tuple[str, ...]:
    """The choices of a row, from one field with a list or from several fields."""
    names = [description.options] if isinstance(description.options, str) else description.options or []
    return tuple(text for name in names for text in field_texts(row, name))


def _shown_options(options: Sequence[str], description: TaskFile) -> tuple[str, ...]:
    """Options as the model chooses among them; with keys, options of one text are one choice, whichever key is right."""
    return tuple(dict.fromkeys(options)) if description.option_keys else tuple(options)


def _keyed_option(answer: str, options: Sequence[str], row: TableRow, option_keys: str | list[str]) -> str:
    """The choice whose key the answer field holds."""
    keys = field_texts(row, option_keys) if isinstance(option_keys, str) else option_keys
    by_key = dict(zip(keys, options, strict=False))  # A row may have fewer choices than there are keys.
    if not by_key.get(answer):
        problem = f"answer {answer!r} is the key of none of its {len(options)} options (keys: {_few(list(by_key))})."
        raise RowError(row.source, "unknown label", f"{problem} Correct the row.")
    return by_key[answer]


def _few(names: Sequence[str] | Mapping[str, str]) -> str:
    """The first ten of some names."""
    return ", ".join(list(names)[:10]) + (", …" if len(names) > 10 else "")


def _read_files(folder: Path, problems: list[RowError] | None) -> dict[str, list[TableRow]]:
    train = find_table(folder, "train")
    if train is None:
        raise TaskError(f"{folder}: has no train.jsonl, train.csv or train.parquet. Put the labelled examples there.")
    test = find_table(folder, "test")
    return {"train": read_table(train, problems=problems), "test": read_table(test, problems=problems) if test else []}


def _read_hub(hub: HubSource, folder: Path) -> dict[str, list[TableRow]]:
    import datasets

    tables = {}
    for split, source in (("train", hub.train_split), ("test", hub.test_split)):
        try:
            data = datasets.load_dataset(hub.path, hub.name, revision=hub.revision, split=source)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:  # RuntimeError: a loading script.
            raise TaskError(f"{folder / 'task.yaml'}: {hub.path} split {source!r} cannot be loaded: {error}") from error
        order = list(range(len(data)))
        if hub.shuffle_seed is not None:
            random.Random(f"{hub.shuffle_seed}/hub/{source}").shuffle(order)
        order = order[: hub.max_rows]
        rows = zip(order, data.select(order), strict=True)
        read = [TableRow(dict(row), f"{hub.path}/{source}:{number + 1}") for number, row in rows]
        tables[split] = [row for row in read if not _is_skipped(row, hub.skip)]
        if len(tables[split]) < len(read):
            logger.info("%s/%s: %d of %d rows left out by hub.skip", hub.path, source, len(read) - len(tables[split]), len(read))
    return tables


def _is_skipped(row: TableRow, skip: Mapping[str, Sequence[str]]) -> bool:
    return any(field_text_or_empty(row, name) in values for name, values in skip.items())


def _finish_task(
    name: str,
    description: TaskFile,
    train: tuple[Example, ...],
    test: tuple[Example, ...],
    *,
    where: str,
    problems: list[RowError] | None,
) -> Task:
    """A task whose label set is complete and whose test labels were all seen in train."""
    if len(train) < 2:
        problem = f"{len(train)} train example(s); a task needs at least 2. Add labelled examples."
        raise_or_add(RowError(where, "few examples", problem), problems)
    words = description.labels.values() if isinstance(description.labels, dict) else description.labels or ()
    labels = tuple(dict.fromkeys(words))
    shared = {example.options for example in train + test}
    if not labels and len(shared) == 1:  # The same options everywhere are a label set.
        labels = shared.pop()
        train, test = (tuple(replace(example, options=()) for example in split) for split in (train, test))
    if description.metric == "macro_f1" and not labels:
        problem = "metric macro_f1 is a mean over labels, and there are none. List `labels`, or choose another metric."
        raise_or_add(RowError(where, "metric without labels", problem), problems)
    seen = {example.answer for example in train}
    for example in test:
        if labels and example.answer not in seen:
            problem = f"test label {example.answer!r} never occurs in train. Add an example of it, or drop the row."
            raise_or_add(RowError(example.source, "unseen label", problem), problems)
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
    """The roles in suite.yaml or SPLIT.json, as names of folders; empty where there is neither."""
    path = next((folder / name for name in ("suite.yaml", "SPLIT.json") if (folder / name).is_file()), None)
    if path is None:
        return {}
    try:
        text = read_utf8(path)
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except YAML_ERRORS as error:
        raise TaskError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TaskError(f"{path}: holds a {type(content).__name__}; it maps roles to lists of tasks.")
    keys = {role: role for role in get_args(Role)} | ({"validation": "validation_tasks"} if path.suffix == ".json" else {})
    for key in content if path.suffix == ".yaml" else ():
        if key not in keys:
            nearest = difflib.get_close_matches(str(key), keys, n=1, cutoff=0.0)[0]
            raise TaskError(f"{path}: unknown key {key!r}; the nearest valid one is {nearest!r} (valid here: {', '.join(keys)}).")
    roles = {}
    for role, key in keys.items():
        names = content.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TaskError(f"{path}: {key} holds {names!r}; it lists names of tasks' folders.")
        roles[role] = tuple(names)
    return roles


def task_of_examples(
    examples: Sequence[Example],
    *,
    name: str,
    test: Sequence[Example] = (),
    where: str = "",
    problems: list[RowError] | None = None,
) -> Task:
    """A task from labelled examples; answers that recur are its label set. Errors name `where`, or else the task.

    Raises:
        TaskError: there are fewer than two examples, or a test label never occurs among them.
    """
    answers = Counter(example.answer for example in examples)
    is_choice = any(example.options for example in examples)
    labels = sorted(answers) if not is_choice and looks_like_labels(answers) else None
    metric: Metric = "accuracy" if labels or is_choice else "token_f1"
    description = TaskFile(input="{input}", answer="answer", labels=labels, metric=metric)
    return _finish_task(name, description, tuple(examples), tuple(test), where=where or name, problems=problems)


def read_examples(path: Path | str, *, problems: list[RowError] | None = None) -> tuple[Example, ...]:
    """Labelled examples in one file: chat messages, MetaICL's rows, or a table with input and answer columns.

    A chat row is {"messages": [{"role", "content", "loss"?}, …]}: each assistant message whose `loss` is not 0 is an answer, and
    the messages since the answer before it are its input.

    Raises:
        TaskError: a row is of no known shape; file, line and fields are named.
    """
    path = Path(path)
    rows = read_table(path, problems=problems)
    description = _infer(path.with_suffix(""), rows)
    if description is not None:
        description = description.model_copy(update={"labels": None})
    examples = _make_examples(rows, description, problems)
    if not examples and not problems:
        raise TaskError(f"{path}: {len(rows)} row(s) hold no answer to learn from. Give assistant messages whose loss is not 0.")
    return examples


def _chat_messages(row: TableRow) -> list[dict[str, Any]]:
    """The messages of a chat row, each with a role, a stripped text and a flag."""
    messages = row.fields.get("messages")
    if not isinstance(messages, list):
        problem = f"`messages` holds a {type(messages).__name__}, not a list. Give a list of messages."
        raise RowError(row.source, "broken chat", problem)
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or not isinstance(message.get("content"), str):
            raise RowError(row.source, "broken chat", f"message {number} needs a `role` and a text `content`.")
        if message.get("loss", 1) not in (0, 1):
            raise RowError(row.source, "broken chat", f"message {number} has loss {message['loss']!r}. Write 0 or 1.")
        checked.append(message | {"content": message["content"].strip()})
    return checked


def _chat_examples(row: TableRow) -> list[Example]:
    examples: list[Example] = []
    pending: list[str] = []
    for number, message in enumerate(_chat_messages(row)):
        content = message["content"]
        if message["role"] != "assistant" or not message.get("loss", 1):
            pending.append(content)
        elif not content or not pending:
            problem = f"message {number} is an answer without text or without an input before it."
            raise RowError(row.source, "empty answer", f"{problem} Fill it in, or set its loss to 0.")
        else:
            examples.append(Example("\n".join(pending), content, source=row.source))
            pending = []
    return examples


def read_queries(path: Path | str, *, folder: Path | None = None) -> list[Example]:
    """The inputs of a file whose answers are wanted; answer columns, if any, are not read. Of a chat, the last messages.

    Args:
        folder: A task's folder, whose task.yaml, if it has one, says how an input is made and where its options stand.

    Raises:
        TaskError: a row lacks a field of the task's template, or has no known input field.
    """
    rows = read_table(Path(path))
    given = read_task_file(folder / "task.yaml") if folder is not None and (folder / "task.yaml").is_file() else None
    if given is None and "messages" in rows[0].fields:
        return [Example(_chat_query(row), "", source=row.source) for row in rows]
    template = given.input if given else input_template(rows[0].fields)
    if template is None:
        raise TaskError(f"{rows[0].source}: no input field among {', '.join(rows[0].fields)}. Name the column `input`.")
    return [
        Example(
            fill_template(template, row),
            "",
            options=_shown_options(_option_texts(row, given), given) if given else (),
            source=row.source,
        )
        for row in rows
    ]


def _chat_query(row: TableRow) -> str:
    """The messages since the last answer, which are what `_chat_examples` would make an input."""
    pending: list[str] = []
    for message in _chat_messages(row):
        is_answer = message["role"] == "assistant" and message.get("loss", 1)
        pending = [] if is_answer else [*pending, message["content"]]
    if not pending:
        raise RowError(row.source, "broken chat", "ends with an answer. End it with the message to be answered.")
    return "\n".join(pending)
