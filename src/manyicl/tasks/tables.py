"""Reading tables of rows: JSONL, CSV and Parquet, each row with its file and line. Loads no torch.

The first broken row is an error. Who wants them all (`manyicl tasks check`) hands in a list of problems, to which each broken
row is added in place of being raised.
"""

import codecs
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyicl.errors import TaskError

SUFFIXES = (".jsonl", ".csv", ".parquet")
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "truth value"),
    ((int, float), "number"),
    (str, "text"),
    ((list, tuple), "list"),
)


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a file: its fields, and where it stands as "file:line"."""

    fields: dict[str, Any]
    source: str


class RowError(TaskError):
    """One row of a file is wrong.

    Attributes:
        source: Where the row stands, as "file:line".
        kind: What is wrong, in two words.
        problem: What was seen, and what to do.
    """

    def __init__(self, source: str, kind: str, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
        self.source = source
        self.kind = kind
        self.problem = problem


def raise_or_add(error: RowError, problems: list[RowError] | None) -> None:
    """Raise an error, or add it to `problems` where all of them are wanted.

    Raises:
        RowError: there is no list of problems.
    """
    if problems is None:
        raise error
    problems.append(error)


def read_table(path: Path, *, problems: list[RowError] | None = None) -> list[TableRow]:
    """The rows of a .jsonl, .csv or .parquet file, in order.

    Raises:
        TaskError: the file is missing, empty, not UTF-8, broken at a line, or of another kind; file and line are named.
    """
    if path.suffix not in SUFFIXES:
        raise TaskError(f"{path}: unknown kind of file. Give one of {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise TaskError(f"{path}: no such file.")
    if path.suffix == ".parquet":
        rows = _read_parquet(path)
    else:
        rows = _read_jsonl(path, problems) if path.suffix == ".jsonl" else _read_csv(path, problems)
    if not rows and not problems:
        raise TaskError(f"{path}: holds no rows. Give at least two examples.")
    return rows


def find_table(folder: Path, stem: str) -> Path | None:
    """The file `stem.jsonl`, `stem.csv` or `stem.parquet` of a folder, if there is one.

    Raises:
        TaskError: there are several.
    """
    found = [folder / f"{stem}{suffix}" for suffix in SUFFIXES if (folder / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise TaskError(f"{folder}: {', '.join(path.name for path in found)} all stand here. Keep one of them.")
    return found[0] if found else None


def read_utf8(path: Path) -> str:
    """The text of a file.

    Raises:
        TaskError: it cannot be read, or is not UTF-8; the line of the first bad byte is named.
    """
    return "\n".join(text for _, text in _read_lines(path, None))


def find_mixed_types(rows: Sequence[TableRow]) -> Iterator[RowError]:
    """For each field whose values are not all of one type: the first row of its rarest type. Missing values have no type."""
    found: dict[str, dict[str, list[TableRow]]] = {}
    for row in rows:
        for name, value in row.fields.items():
            if value is not None and value == value:  # Not nan.
                kind = next((kind for types, kind in _KINDS if isinstance(value, types)), type(value).__name__)
                found.setdefault(name, {}).setdefault(kind, []).append(row)
    for name, kinds in found.items():
        if len(kinds) > 1:
            order = sorted(kinds, key=lambda kind: -len(kinds[kind]))
            most, rarest = order[0], order[-1]
            numbers = f"{len(kinds[rarest])} of {len(rows)} rows, and a {most} in {len(kinds[most])}"
            yield RowError(
                kinds[rarest][0].source, "mixed types", f"field {name!r} holds a {rarest} in {numbers}. Write one kind."
            )


def _read_lines(path: Path, problems: list[RowError] | None) -> Iterator[tuple[int, str]]:
    r"""Numbers and texts of the lines of a UTF-8 file, without `\n`, which alone ends a line: JSON strings may hold others."""
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise TaskError(f"{path}: cannot be read ({error.strerror}).") from error
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            problem = f"byte {error.start + 1} of the line, {line[error.start]:#04x}, is not UTF-8. Save the file as UTF-8."
            raise_or_add(RowError(f"{path}:{number}", "bad UTF-8", problem), problems)
            text = ""  # Left blank, so that later lines keep their numbers.
        yield number, text


def _read_jsonl(path: Path, problems: list[RowError] | None) -> list[TableRow]:
    rows = []
    for number, line in _read_lines(path, problems):
        if line.strip():
            try:
                rows.append(_parse_line(f"{path}:{number}", line))
            except RowError as error:
                raise_or_add(error, problems)
    return rows


def _parse_line(source: str, line: str) -> TableRow:
    try:
        fields = json.loads(line)
        if "\\ud" in line.lower():
            json.dumps(fields, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        problem = f"broken JSON at column {error.colno}: {error.msg}. Mend or remove the line."
        raise RowError(source, "broken JSON", problem) from error
    except UnicodeEncodeError as error:
        problem = f"holds {error.object[error.start]!a}, half of a pair that is no character by itself. Mend or remove the line."
        raise RowError(source, "broken JSON", problem) from error
    except (ValueError, RecursionError) as error:  # A number with thousands of digits, thousands of nested brackets.
        raise RowError(source, "broken JSON", f"cannot be read as JSON: {error}. Mend or remove the line.") from error
    if not isinstance(fields, dict):
        raise RowError(source, "broken JSON", f"holds a {type(fields).__name__}, not an object with fields.")
    return TableRow(fields, source)


def _read_csv(path: Path, problems: list[RowError] | None) -> list[TableRow]:
    text = "\n".join(line for _, line in _read_lines(path, problems))
    # Strict, as otherwise a quote that is never closed would swallow the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    rows: list[TableRow] = []
    line = 1
    try:
        for cells in reader:
            source, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = _checked_header(cells, source)
            elif len(cells) == len(header):
                rows.append(TableRow(dict(zip(header, cells, strict=True)), source))
            else:
                problem = f"the row has {len(cells)} fields, the header {len(header)}. Quote fields that hold commas."
                raise_or_add(RowError(source, "ragged row", problem), problems)
    except csv.Error as error:
        problem = f"broken CSV: {error}. Close each quote and double those inside a field, or give the table as JSONL."
        raise_or_add(RowError(f"{path}:{line}", "broken CSV", problem), problems)
    return rows


def _checked_header(names: list[str], source: str) -> list[str]:
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise TaskError(f"{source}: the header names {twice[0]!r} twice. Give each column its own name.")
    return names


def _read_parquet(path: Path) -> list[TableRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = file.read().to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: cannot be read as Parquet: {error}") from error
    return [TableRow(fields, f"{path}:{number}") for number, fields in enumerate(rows, 1)]


def scalar_text(value: Any) -> Any:
    """A number or truth value as the text that rows hold for it; anything else as it is."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, (int, float)) else value


def _find_field(fields: Mapping[str, Any], name: str) -> Any:
    """The value at a name or a dotted path (`answers.text.0`); None where there is none.

    A number takes one item of a list, a name the field of that name in each of its items.
    """
    if name in fields:
        return fields[name]
    value: Any = fields
    for part in name.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, (list, tuple)) and part.isdecimal():
            value = value[int(part)] if int(part) < len(value) else None
        elif isinstance(value, (list, tuple)):
            value = [item.get(part) if isinstance(item, Mapping) else None for item in value]
        else:
            return None
    return value


def _is_missing(value: Any) -> bool:
    return value is None or bool(value != value)  # Tables written by pandas hold nan where a value is missing.


def has_column(row: TableRow, name: str) -> bool:
    """Whether a row has the column of a field, or of the first part of a dotted path."""
    return name in row.fields or name.partition(".")[0] in row.fields


def _field(row: TableRow, name: str) -> Any:
    value = _find_field(row.fields, name)
    if _is_missing(value):
        what = "has no value" if has_column(row, name) else "is missing"
        problem = f"field {name!r} {what} (there: {', '.join(row.fields)}). Correct the row or the task.yaml."
        raise RowError(row.source, "missing field", problem)
    return value


def field_text(row: TableRow, name: str) -> str:
    """A field as text: lists joined by "; ", numbers and truth values as JSON writes them, ends stripped."""
    return _as_text(row, name, _field(row, name))


def field_text_or_empty(row: TableRow, name: str) -> str:
    """A field as text, empty where its column holds no value.

    Raises:
        RowError: there is no such column, or it holds no text.
    """
    missing = has_column(row, name) and _is_missing(_find_field(row.fields, name))
    return "" if missing else field_text(row, name)


def field_texts(row: TableRow, name: str) -> tuple[str, ...]:
    """A field that holds several texts; a single one stands for itself."""
    value = _field(row, name)
    return tuple(_as_text(row, name, part) for part in (value if isinstance(value, (list, tuple)) else [value]))


def _as_text(row: TableRow, name: str, value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "; ".join(_as_text(row, name, part) for part in value)
    if value is None or isinstance(value, (Mapping, bytes)):
        held = "nothing" if value is None else type(value).__name__
        raise RowError(row.source, "no text", f"field {name!r} holds {held} where a text is wanted. Write a text.")
    return str(scalar_text(value)).strip()
