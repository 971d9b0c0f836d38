"""What `manyicl study` does: show the plan, do the cells, say where the results are."""

from collections.abc import Sequence
from pathlib import Path

import torch

from manyicl.errors import RecipeError
from manyicl.results.files import write_results
from manyicl.study.cells import select_cells
from manyicl.study.forecast import forecast_study, show_forecast
from manyicl.study.recipe import load_study_recipe
from manyicl.study.restore import restore_folder
from manyicl.study.runner import Progress, StudyFolder, run_study
from manyicl.tasks.readers import load_suite


def open_study(path: Path, output: str | None, only: Sequence[str], *, restore: Path | None = None) -> tuple[StudyFolder, str]:
    """The folder of a study recipe, made if it is not there, and its plan as text.

    Args:
        output: Folder in place of the recipe's.
        only: Patterns of the names of cells, as in `cells.select_cells`; all cells unless given.
        restore: Published results of this study to go on from, in a folder in which no cell was begun.

    Raises:
        RecipeError: the recipe is wrong, a pattern names no cell, or the folder or what to restore belongs to another study.
        RecordsError: the results to restore are broken.
        TaskError: a task cannot be read.
        StorageError: the folder cannot be written.
    """
    recipe = load_study_recipe(path)
    if output is not None:
        recipe = recipe.model_copy(update={"output": output})
    suite = load_suite(recipe.tasks)
    folder = StudyFolder(recipe, suite)
    for pattern in only:
        if not select_cells(folder.cells, [pattern]):
            kinds = ", ".join(dict.fromkeys(cell.kind for cell in folder.cells))
            raise RecipeError(
                f"--only names {pattern!r}, which is no cell of this study. Names begin with one of: {kinds}; "
                f"the first is {folder.cells[0].name}."
            )
    if restore is not None:
        restore_folder(folder, restore)
    left = [cell for cell in select_cells(folder.cells, only) if folder.status(cell.name) != "done"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = show_forecast(forecast_study(recipe, suite, left), done=folder.progress().done, device=device)
    return folder, plan


def run_opened(folder: StudyFolder, only: Sequence[str], minutes: float | None) -> Progress:
    """Do what is left; see `runner.run_study`."""
    return run_study(folder.recipe, only=only, minutes=minutes)


def finished_runs(folder: StudyFolder) -> dict[str, Path]:
    """The run folders of the trainings that are done here, by the names of their models in the records."""
    runs = {cell.name: folder.folder(cell.name) / "run" for cell in folder.cells if cell.kind == "train"}
    return {
        name.partition("/")[2]: run
        for name, run in runs.items()
        if folder.status(name) == "done" and (run / "run.json").is_file()
    }


def gather_results(folder: StudyFolder) -> Path:
    """Write the results of the cells that are done, and return their folder."""
    path = folder.output / "results"
    write_results(folder.gather(), path)
    return path
