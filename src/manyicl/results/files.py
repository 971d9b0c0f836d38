"""The files of a study's results, as reports read them.

    study.yaml         the resolved recipe
    records.jsonl.gz   every evaluation, cell by cell (see `records`)
    models.json        what each tuned model cost
    corpora.json       bits of plain text under each model, window by window
    harness.json       scores of lm-evaluation-harness tasks under each model, where some were asked for
    cells.json         what was done, what failed, what is open, and what it took
    tasks.json         hashes of the tasks' examples
    claims.json        what follows, made from the others by `claims`

`method` is what is compared (all_answers, few_shot_16 …); `model` is one set of weights of it, named method/seed-0/update-100.
"""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from manyicl.errors import RecordsError
from manyicl.files import write_bytes_atomic, write_json_atomic, write_text_atomic
from manyicl.records import EvaluationRecord, read_records

BASE = "base"
RECORDS_FILE = "records.jsonl.gz"
Fact = TypeVar("Fact", bound="_Fact")


class _Fact(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelFacts(_Fact):
    """One set of tuned weights, and what it took to get there."""

    model: str = Field(description="Its name in the records.")
    method: str
    setting: str = Field("held_out", description="`held_out`, or `family` where a whole family was left out of the training.")
    task: str = Field("", description="The task of a dedicated model; empty for one that is tuned on many.")
    num_examples: int | None = Field(None, description="Examples that a dedicated model was tuned on.")
    training_seed: int
    learning_rate: float
    updates: int
    tokens: int = Field(description="Tokens fed, padding not counted.")
    answers: int = Field(description="Answers in these tokens; targets or context.")
    target_answers: int = Field(description="Answers that were targets.")
    seconds: float = Field(description="Seconds of updates.")
    peak_memory_bytes: int
    is_final: bool = Field(description="Whether the whole budget was spent; false for a snapshot on the way.")


class CorpusFacts(_Fact):
    """A plain text under one model, in windows that do not overlap."""

    model: str
    method: str
    corpus: str
    num_bytes: int
    window_bits: list[float] = Field(description="Bits of the predicted tokens of each window.")

    @property
    def bits_per_byte(self) -> float:
        """Bits of all windows over the bytes of the text."""
        return sum(self.window_bits) / self.num_bytes


class HarnessFacts(_Fact):
    """One metric of a task of lm-evaluation-harness under one model."""

    model: str
    method: str
    task: str
    metric: str
    value: float
    standard_error: float | None = Field(None, description="As the harness has it; None where it has none.")


class CellFacts(_Fact):
    """One piece of a study's work."""

    cell: str = Field(description="Its name.")
    kind: str = Field(description="train, evaluate, corpora, dedicated, classic or robustness.")
    status: Literal["done", "failed", "open"]
    seconds: float = Field(0.0, description="Wall time.")
    peak_memory_bytes: int = 0
    error: str = ""
    finished: str = Field("", description="When, ISO 8601 in UTC.")
    versions: dict[str, str] = Field(default_factory=dict)
    num_records: int = Field(0, description="Its records; those of all cells stand one after the other, in this order.")
    facts: dict[str, Any] = Field(default_factory=dict, description="What later cells ask of it.")


class StudyResults(BaseModel):
    """Everything that a study has found so far."""

    model_config = ConfigDict(frozen=True)

    recipe: dict[str, Any]
    records: list[EvaluationRecord]
    models: list[ModelFacts]
    corpora: list[CorpusFacts]
    cells: list[CellFacts]
    harness: list[HarnessFacts] = []
    examples: dict[str, str] = Field(default_factory=dict)
    claims: dict[str, Any] = Field(default_factory=dict)

    def model_facts(self, model: str) -> ModelFacts | None:
        """What a tuned model cost; None for one that was not tuned."""
        return next((facts for facts in self.models if facts.model == model), None)


def write_results(results: StudyResults, folder: Path) -> None:
    """Write the files of a study's results, each in one step.

    Raises:
        StorageError: the folder cannot be written.
    """
    write_text_atomic(folder / "study.yaml", yaml.safe_dump(results.recipe, sort_keys=False, allow_unicode=True))
    lines = "".join(record.model_dump_json() + "\n" for record in results.records)
    write_bytes_atomic(folder / RECORDS_FILE, gzip.compress(lines.encode(), mtime=0))
    for name in ("models", "corpora", "harness", "cells"):
        facts: Sequence[_Fact] = getattr(results, name)
        write_text_atomic(folder / f"{name}.json", _one_a_line(facts))
    write_json_atomic(folder / "tasks.json", results.examples)
    write_text_atomic(folder / "claims.json", TypeAdapter(dict[str, Any]).dump_json(results.claims, indent=2).decode() + "\n")


def _one_a_line(facts: Sequence[_Fact]) -> str:
    """JSON with one entry a line, so that a change shows as a line."""
    return "[\n" + ",\n".join(each.model_dump_json() for each in facts) + "\n]\n" if facts else "[]\n"


def read_results(folder: Path) -> StudyResults:
    """The results in a folder; claims are read as they stand, and are empty where none were made.

    Raises:
        RecordsError: the folder holds no results of a study, or a file of them is broken.
    """
    if not (folder / "study.yaml").is_file():
        raise RecordsError(f"{folder}: holds no study.yaml. Give the folder that `manyicl study` has written its results to.")
    return StudyResults(
        recipe=_read_mapping(folder / "study.yaml"),
        records=read_records(folder / RECORDS_FILE) if (folder / RECORDS_FILE).is_file() else [],
        models=_read_facts(folder / "models.json", ModelFacts),
        corpora=_read_facts(folder / "corpora.json", CorpusFacts),
        harness=_read_facts(folder / "harness.json", HarnessFacts),
        cells=_read_facts(folder / "cells.json", CellFacts),
        examples=_read_mapping(folder / "tasks.json") if (folder / "tasks.json").is_file() else {},
        claims=_read_mapping(folder / "claims.json") if (folder / "claims.json").is_file() else {},
    )


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecordsError(f"{path}: cannot be read ({error}). Run the study again: it writes its results anew.") from error
    if not isinstance(content, dict):
        raise RecordsError(f"{path}: holds a {type(content).__name__}, not a mapping. Run the study again.")
    return content


def _read_facts(path: Path, kind: type[Fact]) -> list[Fact]:
    """The entries of a file; none where there is no file."""
    if not path.is_file():
        return []
    try:
        return TypeAdapter(list[kind]).validate_json(path.read_bytes())  # type: ignore[valid-type]
    except (OSError, ValidationError) as error:
        raise RecordsError(f"{path}: is no list of {kind.__name__} ({error}). Run the study again.") from error
