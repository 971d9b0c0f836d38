"""What `manyicl study` does: show the plan, do the cells, say where the results are."""

from collections.abc import Sequence
from pathlib import Path

import torch

from manyicl.errors import RecipeError
from manyicl.results.files import write_results
from manyicl.study.forecast import forecast_study, show_forecast
from manyicl.study.recipe import load_study_recipe
from manyicl.study.restore import restore_folder
from manyicl.study.runner import Progress, StudyFolder, run_study
from manyicl.tasks.readers import load_suite


def open_study(path: Path, output: str | None, kinds: Sequence[str], *, restore: Path | None = None) -> tuple[StudyFolder, str]:
    """The folder of a study recipe, made if it is not there, and its plan as text.

    Args:
        output: Folder in place of the recipe's.
        kinds: Only cells of these kinds; all unless given.
        restore: Published results of this study to go on from, in a folder in which no cell was begun.

    Raises:
        RecipeError: the recipe is wrong, a kind is unknown, the folder belongs to another study, or the results to restore do.
        RecordsError: the results to restore are broken.
        TaskError: a task cannot be read.
        StorageError: the folder cannot be written.
    """
    recipe = load_study_recipe(path)
    if output is not None:
        recipe = recipe.model_copy(update={"output": output})
    suite = load_suite(recipe.tasks)
    folder = StudyFolder(recipe, suite)
    known = list(dict.fromkeys(cell.kind for cell in folder.cells))
    for kind in kinds:
        if kind not in known:
            raise RecipeError(f"--kinds names {kind!r}, which is no kind of cell of this study ({', '.join(known)}).")
    if restore is not None:
        restore_folder(folder, restore)
    left = [cell for cell in folder.cells if folder.status(cell.name) != "done" and (not kinds or cell.kind in kinds)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = show_forecast(forecast_study(recipe, suite, left), done=folder.progress().done, device=device)
    return folder, plan


def run_opened(folder: StudyFolder, kinds: Sequence[str], minutes: float | None) -> Progress:
    """Do what is left; see `runner.run_study`."""
    return run_study(folder.recipe, kinds=kinds, minutes=minutes)


def gather_results(folder: StudyFolder) -> Path:
    """Write the results of the cells that are done, and return their folder."""
    path = folder.output / "results"
    write_results(folder.gather(), path)
    return path
