"""Makes a study's folder again from its published results: what is done stays done on another machine.

Results hold every record and figure but no weights. A training cell is restored as done; its weights are trained again, from the
same seed, when a cell that is left asks for them (see `jobs.Study`). On another processor or in another number format they are
not the same bit for bit, which the fingerprints in the records show.
"""

from pathlib import Path

from pydantic import ValidationError

from manyicl.errors import RecipeError, RecordsError
from manyicl.files import write_text_atomic
from manyicl.records import EvaluationRecord
from manyicl.results.files import CellFacts, StudyResults, read_results
from manyicl.study.cells import Cell
from manyicl.study.runner import CellResult, StudyFolder, compare_recipes


def restore_folder(folder: StudyFolder, source: Path) -> int:
    """Put the finished cells of the results in `source` into a folder in which none was begun; how many they are.

    Raises:
        RecipeError: a cell was begun in the folder, or the results are those of another recipe.
        RecordsError: the results are broken, or were written by a version that did not note which records are whose.
        StorageError: the folder cannot be written.
    """
    if (folder.output / "cells").exists():
        raise RecipeError(f"{folder.output}: cells were begun here already. Restore into another output, or leave --restore out.")
    results = read_results(source)
    try:
        differing = compare_recipes(folder.recipe, results.recipe)
    except ValidationError as error:
        raise RecipeError(f"{source / 'study.yaml'}: is no study recipe of this version ({error}).") from error
    if differing:
        raise RecipeError(f"{source}: holds the results of another recipe ({differing} differ). Give the recipe they came from.")
    facts = {cell.cell: cell for cell in results.cells if cell.status == "done"}
    unknown = sorted(facts.keys() - {cell.name for cell in folder.cells})
    if unknown:
        raise RecipeError(f"{source}: holds cells that this study has not ({', '.join(unknown)}).")
    parts = _share_out(results, source)
    for cell in folder.cells:
        if cell.name in facts:
            _restore_cell(folder, cell, facts[cell.name], results, parts[cell.name])
    return len(facts)


def _share_out(results: StudyResults, source: Path) -> dict[str, list[EvaluationRecord]]:
    """Records by cell: they stand in the order of cells."""
    parts, start = {}, 0
    for cell in results.cells:
        parts[cell.cell] = results.records[start : start + cell.num_records]
        start += cell.num_records
    if start != len(results.records):
        raise RecordsError(
            f"{source}: its cells account for {start} of {len(results.records)} records; the files are not of one writing. "
            "Take them from one commit."
        )
    return parts


def _restore_cell(
    folder: StudyFolder, cell: Cell, facts: CellFacts, results: StudyResults, records: list[EvaluationRecord]
) -> None:
    """Write a cell's records, then its result."""
    own = cell.name.partition("/")[2]
    models = {
        "train": [each for each in results.models if own in (each.model, each.model.rpartition("/")[0])],  # And its snapshots.
        "dedicated": [each for each in results.models if each.model == cell.name],
    }
    result = CellResult(
        num_records=len(records),
        models=models.get(cell.kind.removesuffix("-rate"), []),
        corpora=[each for each in results.corpora if cell.kind == "forgetting" and each.model == own],
        harness=[each for each in results.harness if cell.kind == "harness" and each.model == own],
        **facts.model_dump(include={"seconds", "peak_memory_bytes", "finished", "versions", "facts"}),
    )
    path = folder.folder(cell.name)
    if records:
        write_text_atomic(path / "records.jsonl", "".join(record.model_dump_json() + "\n" for record in records))
    write_text_atomic(path / "result.json", result.model_dump_json(indent=1) + "\n")
