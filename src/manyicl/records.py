"""Evaluation records: one typed JSON line per cell; every table and plot is made from them. Loads no torch.

    cell  = (method, model, task, split, shots, seed, condition)
    line  = cell, value, demonstrations used, tokens, seconds, versions, and per query: id, score, gold and predicted label index

No text of a task is recorded. Lines are appended whole and synced: a kill leaves at most one torn last line, which readers
pass over and say so. Processes that share an evaluation write a file each, and the last to finish makes them one.
"""

import glob
import gzip
import hashlib
import logging
import math
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manyicl.errors import RecordsError
from manyicl.files import storage_errors, write_text_atomic
from manyicl.metrics import mean_interval

logger = logging.getLogger(__name__)

Shots = int | Literal["max"]
CellKey = tuple[str, str, str, str, Shots, int, str]
_PART_NAME = re.compile(r"\.[0-9a-f]{8}-\d+-of-\d+\.(part|done|merging)$")


class QueryScores(BaseModel):
    """What happened to each query, as parallel lists."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ids: list[int] = Field(description="Position of the query in its split.")
    scores: list[float] = Field(description="Score on 0-1.")
    gold: list[int] = Field(description="Index of the gold label, -1 for free text.")
    predicted: list[int] = Field(description="Index of the predicted label, -1 for free text.")


class EvaluationRecord(BaseModel):
    """The result of one cell."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    schema_version: Literal[1] = 1
    method: str = Field(description="How the answer was obtained.")
    model: str = Field(description="Name of the model.")
    model_note: str = Field("", description="What must stand beside every result of the model.")
    task: str
    family: str
    role: str = Field(description="Role of the task in its suite.")
    split: str = Field("test", description="Split that the queries come from.")
    metric: str
    shots: Shots = Field(description="Demonstrations asked for, or `max`.")
    num_demonstrations: int = Field(description="Demonstrations in the context.")
    seed: int = Field(description="Seed of the order of demonstrations.")
    condition: str = Field("", description="What was done to the demonstrations or the format; empty for nothing.")
    value: float = Field(description="Value of the metric, 0-1.")
    num_queries: int
    prefix_tokens: int = Field(description="Tokens of the demonstrations.")
    query_tokens: int = Field(description="Tokens of all queries.")
    seconds: float = Field(description="Answering the queries; the prefill is counted in prefill_seconds.")
    prefill_seconds: float = Field(description="Prefill that this cell's points of the shot curve shared.")
    fingerprint: str = Field(description="Hash of model, examples and settings.")
    versions: dict[str, str] = Field(default_factory=dict)
    queries: QueryScores

    @property
    def key(self) -> CellKey:
        """What identifies the cell."""
        return (self.method, self.model, self.task, self.split, self.shots, self.seed, self.condition)


def read_records(path: Path) -> list[EvaluationRecord]:
    """The records of a .jsonl or .jsonl.gz file; a torn last line is passed over, and that is said.

    Raises:
        RecordsError: a line is broken that is not a torn last one; file and line are named.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise RecordsError(f"{path}: cannot be read ({error}). Give a whole .jsonl or .jsonl.gz file of records.") from error
    lines = content.split(b"\n")
    if lines[-1]:
        logger.warning("%s: the last line (%d bytes) is torn; its cell is done again", path, len(lines[-1]))
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            records.append(EvaluationRecord.model_validate_json(line))
        except ValidationError as error:
            problem = error.errors()[0]
            raise RecordsError(f"{path}:{number}: no record: {problem['msg']}. Remove the line, or the file.") from error
    return records


class RecordWriter:
    """Appends records to a file, each on disk before the next is computed.

    Args:
        path: A .jsonl file; a torn last line is cut off first. Its finished cells are in `finished`. Files that processes have
            left beside it are merged into it.

    Raises:
        RecordsError: the file holds broken records, or is a .gz file.
        StorageError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        _refuse_compressed(path)
        if _parts_of(path):
            logger.info("%s: taking in what processes have left beside it", path)
            _merge_parts(path)
        self._open(path)

    def _open(self, path: Path) -> None:
        self.path = path
        self.finished: dict[CellKey, EvaluationRecord] = {}
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        for record in read_records(path):
            self.finished[record.key] = record
        with storage_errors(path):
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(path, whole)

    def append(self, record: EvaluationRecord) -> None:
        """Write one record durably.

        Raises:
            StorageError: it cannot be written; the file is as it was before.
        """
        rest = memoryview(record.model_dump_json().encode() + b"\n")
        # Unbuffered, as a buffer that could not be written would be written again when the file is closed.
        with storage_errors(self.path), self.path.open("ab", buffering=0) as stream:
            whole = stream.tell()
            try:
                while rest:
                    rest = rest[stream.write(rest) :]
                os.fsync(stream.fileno())
            except BaseException:
                os.truncate(self.path, whole)  # A line appended to half of one would break both.
                raise
        self.finished[record.key] = record

    def find(self, key: CellKey, fingerprint: str) -> EvaluationRecord | None:
        """The finished record of a cell, if there is one.

        Raises:
            RecordsError: there is one with another model, other examples or other settings.
        """
        record = self.finished.get(key)
        if record is not None and record.fingerprint != fingerprint:
            raise RecordsError(
                f"{self.path}: holds {record.task} at {record.shots} shots, seed {record.seed}, of another model, other examples "
                "or other settings. Choose another output file."
            )
        return record

    def finish(self) -> bool:
        """Whether the whole evaluation is in the output file, now that this process has done what it had to do."""
        return True


class SharedRecordWriter(RecordWriter):
    """Appends the records of one of several processes to a file of its own; the last process to finish merges them.

        records.jsonl.5f0c1a22-0-of-2.part       this process's own file, named .done when its share is finished
        records.jsonl.5f0c1a22-1-of-2.done       all done: merged into records.jsonl, and removed

    No process waits for another or writes its file, so that machines need share no more than a folder, and need not run at the
    same time. Cells that stand in `output`, or in what a stopped evaluation has left beside it, are copied and not done again.

    Args:
        output: The .jsonl file that the records end in.
        place: The number of this process, from 0, and how many there are.
        request: Says what is evaluated. Files of another request are no sign that a share of this one is finished.

    Raises:
        RecordsError: a file holds broken records, or `output` is a .gz file.
        StorageError: the folder cannot be written.
    """

    def __init__(self, output: Path, *, place: tuple[int, int], request: str) -> None:
        _refuse_compressed(output)
        self.output = output
        self._rank, self._size = place
        self._digest = hashlib.sha256(request.encode()).hexdigest()[:8]
        own = self._own_file(self._rank, "part")
        with storage_errors(own):
            for mark in ("done", "merging"):  # Left by a process that was stopped before all were merged.
                if self._own_file(self._rank, mark).is_file():
                    self._own_file(self._rank, mark).replace(own)
        self._elsewhere = {record.key: record for record in _read_all(output)}
        self._open(own)

    def _own_file(self, rank: int, mark: str) -> Path:
        return self.output.with_name(f"{self.output.name}.{self._digest}-{rank}-of-{self._size}.{mark}")

    def find(self, key: CellKey, fingerprint: str) -> EvaluationRecord | None:
        """The finished record of a cell, if there is one in any of the files; it is then in this process's own too.

        Raises:
            RecordsError: there is one with another model, other examples or other settings.
        """
        is_own = key in self.finished
        if not is_own and key in self._elsewhere:
            self.finished[key] = self._elsewhere[key]
        record = super().find(key, fingerprint)
        if record is not None and not is_own:
            self.append(record)
        return record

    def finish(self) -> bool:
        """Mark this process's share as finished, and merge all of them if it is the last.

        Returns:
            Whether `output` holds the whole evaluation; false where others are still at work.

        Raises:
            RecordsError: two files contradict each other about a cell.
        """
        with storage_errors(self.path):
            self.path.replace(self._own_file(self._rank, "done"))
            if not all(self._own_file(rank, "done").is_file() for rank in range(self._size)):
                return False
            try:  # If two are last, one of them can rename the file.
                self._own_file(0, "done").replace(self._own_file(0, "merging"))
            except FileNotFoundError:
                return False
        _merge_parts(self.output)
        return True


def _refuse_compressed(path: Path) -> None:
    if path.suffix == ".gz":
        raise RecordsError(f"{path}: records are appended line by line, which a .gz file does not allow. Name a .jsonl file.")


def _parts_of(output: Path) -> list[Path]:
    """The files of processes beside `output`; the one whose name says that they are being merged comes last."""
    found = [path for path in output.parent.glob(f"{glob.escape(output.name)}.*") if _PART_NAME.search(path.name)]
    return sorted(found, key=lambda path: (path.suffix == ".merging", path.name))


def _read_all(output: Path) -> list[EvaluationRecord]:
    """The records of `output` and of what stands beside it."""
    paths = [*_parts_of(output), output]  # In this order: a part that is merged meanwhile stands in `output` by then.
    return merge_records(path for path in paths if path.is_file())


def _merge_parts(output: Path) -> None:
    """Make one file of `output` and what stands beside it: written in one step, before anything is removed."""
    parts = _parts_of(output)
    records = _read_all(output)
    write_text_atomic(output, "".join(record.model_dump_json() + "\n" for record in records))
    with storage_errors(output):
        for path in parts:
            path.unlink(missing_ok=True)


def merge_records(paths: Iterable[Path]) -> list[EvaluationRecord]:
    """The records of several files, each cell once.

    Raises:
        RecordsError: two files contradict each other about a cell.
    """
    merged: dict[CellKey, EvaluationRecord] = {}
    for path in paths:
        for record in read_records(path):
            known = merged.setdefault(record.key, record)
            if (known.fingerprint, known.value) != (record.fingerprint, record.value):
                raise RecordsError(
                    f"{path}: {record.key} has value {record.value:.4f}, another file says {known.value:.4f}. Keep one of them."
                )
    return list(merged.values())


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A method's result on one task, or its mean over tasks, at one number of shots.

    Attributes:
        low: Lower end of the interval over seeds, nan for one seed.
        worst: The worst seed.
        num_tasks: Tasks that reach this number of shots; 1 for a single task.
    """

    method: str
    model: str
    task: str
    shots: Shots
    mean: float
    low: float
    high: float
    worst: float
    num_seeds: int
    num_tasks: int = 1


def shot_order(shots: Shots) -> float:
    """Sorts shot counts: numbers upwards, then `max`."""
    return math.inf if shots == "max" else float(shots)


def task_curves(records: Sequence[EvaluationRecord]) -> list[CurvePoint]:
    """One point per method, model, task and shots: mean, interval and worst over seeds."""
    groups: dict[tuple[str, str, str, Shots], list[float]] = {}
    for record in records:
        groups.setdefault((record.method, record.model, record.task, record.shots), []).append(record.value)
    points = [
        CurvePoint(*key, *mean_interval(values), worst=min(values), num_seeds=len(values)) for key, values in groups.items()
    ]
    return sorted(points, key=lambda point: (point.task, point.method, point.model, shot_order(point.shots)))


def mean_curve(records: Sequence[EvaluationRecord], name: str = "mean over tasks") -> list[CurvePoint]:
    """The mean over tasks per method, model and shots, its interval over seeds, and how many tasks reach each point.

    Tasks in which a shot count does not fit are absent from that point and never repeated with fewer shots.
    """
    groups: dict[tuple[str, str, Shots], list[EvaluationRecord]] = {}
    for record in records:
        groups.setdefault((record.method, record.model, record.shots), []).append(record)
    points = []
    for (method, model, shots), members in groups.items():
        tasks = {record.task for record in members}
        seeds = sorted({record.seed for record in members})
        by_seed = [[record.value for record in members if record.seed == seed] for seed in seeds]
        complete = [sum(values) / len(values) for values in by_seed if len(values) == len(tasks)]
        values = complete or [_mean_of_task_means(members)]
        points.append(CurvePoint(method, model, name, shots, *mean_interval(values), min(values), len(values), len(tasks)))
    return sorted(points, key=lambda point: (point.method, point.model, shot_order(point.shots)))


def _mean_of_task_means(records: Sequence[EvaluationRecord]) -> float:
    """The mean over tasks where no seed reaches all of them; a task with more seeds weighs no more."""
    values: dict[str, list[float]] = {}
    for record in records:
        values.setdefault(record.task, []).append(record.value)
    return sum(sum(own) / len(own) for own in values.values()) / len(values)
