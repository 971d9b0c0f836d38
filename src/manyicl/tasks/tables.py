"""Reading tables of rows: JSONL, CSV and Parquet, each row with its file and line. Loads no torch."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyicl.errors import TaskError

SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a file: its fields, and where it stands as "file:line"."""

    fields: dict[str, Any]
    source: str


def read_table(path: Path) -> list[TableRow]:
    """The rows of a .jsonl, .csv or .parquet file, in order.

    Raises:
        TaskError: the file is missing, empty, not UTF-8, broken at a line, or of another kind; file and line are named.
    """
    if path.suffix not in SUFFIXES:
        raise TaskError(f"{path}: unknown kind of file. Give one of {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise TaskError(f"{path}: no such file.")
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_text_table(path)
    if not rows:
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


def _read_text_table(path: Path) -> list[TableRow]:
    text = read_utf8(path)
    if path.suffix == ".jsonl":
        return [_parse_line(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    reader = csv.DictReader(io.StringIO(text))
    rows = []
    for fields in reader:
        if None in fields or None in fields.values():
            raise TaskError(f"{path}:{reader.line_num}: the row has not the {len(reader.fieldnames or [])} fields of the header.")
        rows.append(TableRow(dict(fields), f"{path}:{reader.line_num}"))
    return rows


def read_utf8(path: Path) -> str:
    """The text of a file.

    Raises:
        TaskError: it cannot be read, or is not UTF-8; the line of the first bad byte is named.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TaskError(f"{path}: cannot be read ({error.strerror}).") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise TaskError(
            f"{path}:{line}: byte {content[error.start]:#04x} is not UTF-8 "
            f"(byte {error.start} of the file). Save the file as UTF-8."
        ) from error


def _parse_line(path: Path, number: int, line: str) -> TableRow:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise TaskError(f"{path}:{number}: broken JSON at column {error.colno}: {error.msg}. Mend or remove the line.") from error
    if not isinstance(fields, dict):
        raise TaskError(f"{path}:{number}: holds a {type(fields).__name__}, not an object with fields.")
    return TableRow(fields, f"{path}:{number}")


def _read_parquet(path: Path) -> list[TableRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"{path}: cannot be read as Parquet: {error}") from error
    return [TableRow(fields, f"{path}:{number}") for number, fields in enumerate(table.to_pylist(), 1)]
