"""Makes a study's folder again from its published results: what is done stays done on another machine.

Cells that were read with fewer queries than the recipe asks for are left open.

Results hold every record and figure but no weights. A training whose weights a cell that is left needs is to be repeated, from
the same seed and in the same number format: it is left open, with its published figures beside it until it is done again. On
a like machine it ends in the same weights bit for bit. On another it ends in weights that differ in the last digits: what
was found with the published ones is then done again too, so that all figures of a model are of one set of weights.
"""

import shutil
from pathlib import Path

from pydantic import ValidationError

from manyicl.errors import RecipeError, RecordsError
from manyicl.files import storage_errors, write_text_atomic
from manyicl.records import EvaluationRecord
from manyicl.results.files import CellFacts, StudyResults, read_results
from manyicl.study.cells import Cell
from manyicl.study.runner import PUBLISHED_FILE, CellResult, StudyFolder, compare_mappings, compare_recipes


def restore_folder(folder: StudyFolder, source: Path) -> int:
    """Put the finished cells of `source`, with as many queries as asked for, into a folder with none; how many they are.

    The folder has all of them or, after a kill, none.

    Raises:
        RecipeError: a cell was begun in the folder, or the results are those of another recipe, number format or state of the
            examples.
        RecordsError: the results are broken, or were written by a version that did not note which records are whose.
        StorageError: the folder cannot be written.
    """
    cells = folder.output / "cells"
    if cells.exists():
        raise RecipeError(f"{folder.output}: cells were begun here already. Restore into another output, or leave --restore out.")
    results = read_results(source)
    _check(folder, results, source)
    parts = _share_out(results, source)
    facts = {cell.cell: cell for cell in results.cells if cell.status == "done" and not folder.is_short(parts[cell.cell])}
    needed = {name for cell in folder.cells if cell.name not in facts for name in cell.needs}
    unfinished = folder.output / "cells.restoring"
    with storage_errors(unfinished):
        shutil.rmtree(unfinished, ignore_errors=True)
        for cell in folder.cells:
            if cell.name in facts:
                is_repeated = cell.kind == "train" and cell.name in needed
                _write_cell(
                    unfinished / cell.name,
                    _result_of(cell, facts[cell.name], results, len(parts[cell.name])),
                    parts[cell.name],
                    name=PUBLISHED_FILE if is_repeated else "result.json",
                )
        unfinished.rename(cells)
    return len(facts)


def _check(folder: StudyFolder, results: StudyResults, source: Path) -> None:
    """Whether the results are those of the folder's study."""
    try:
        differing = compare_recipes(folder.recipe, results.recipe)
    except ValidationError as error:
        raise RecipeError(
            f"{source / 'study.yaml'}: is no study recipe of this version ({error}). Restore with the version that wrote it."
        ) from error
    if differing:
        raise RecipeError(f"{source}: holds the results of another recipe ({differing} differ). Give the recipe they came from.")
    changed = compare_mappings(folder.examples, results.examples) if results.examples else ""
    if changed:
        raise RecipeError(f"{source}: was made from other examples of {changed}. Give the examples it was made from.")
    unknown = sorted({cell.cell for cell in results.cells if cell.status == "done"} - {cell.name for cell in folder.cells})
    if unknown:
        raise RecipeError(
            f"{source}: holds cells that this study does not have ({', '.join(unknown)}). Give the recipe they came "
            "from; if it is this, restore with the version that wrote them."
        )


def _share_out(results: StudyResults, source: Path) -> dict[str, list[EvaluationRecord]]:
    """Records by cell: they stand in the order of cells."""
    parts, start = {}, 0
    for cell in results.cells:
        parts[cell.cell] = results.records[start : start + cell.num_records]
        start += cell.num_records
    if start != len(results.records):
        raise RecordsError(
            f"{source}: its cells account for {start} of {len(results.records)} records: the files are not of one writing, or of "
            "a version that did not count them. Take them from one commit, written by this version."
        )
    return parts


def _result_of(cell: Cell, facts: CellFacts, results: StudyResults, num_records: int) -> CellResult:
    """What stood in the cell's result.json."""
    own = cell.name.partition("/")[2]
    models = {
        "train": [each for each in results.models if own in (each.model, each.model.rpartition("/")[0])],  # And its snapshots.
        "dedicated": [each for each in results.models if each.model == cell.name],
    }
    return CellResult(
        num_records=num_records,
        models=models.get(cell.kind.removesuffix("-rate"), []),
        corpora=[each for each in results.corpora if cell.kind == "forgetting" and each.model == own],
        harness=[each for each in results.harness if cell.kind == "harness" and each.model == own],
        **facts.model_dump(include={"seconds", "peak_memory_bytes", "finished", "versions", "facts"}),
    )


def _write_cell(path: Path, result: CellResult, records: list[EvaluationRecord], *, name: str) -> None:
    if records:
        write_text_atomic(path / "records.jsonl", "".join(record.model_dump_json() + "\n" for record in records))
    write_text_atomic(path / name, result.model_dump_json(indent=1) + "\n")
