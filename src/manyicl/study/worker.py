"""The process in which a study's cells are done: python -m manyicl.study.worker FOLDER ONLY DEADLINE (see `runner`)."""

import logging
import sys
from pathlib import Path

import yaml

from manyicl.study.recipe import StudyRecipe
from manyicl.study.runner import work


def main() -> None:
    """Work on the study whose folder is named."""
    output, only, deadline = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    content = yaml.safe_load((Path(output) / "study.yaml").read_text(encoding="utf-8"))
    recipe = StudyRecipe.model_validate(content | {"output": output})
    work(recipe, only=[pattern for pattern in only.split(",") if pattern], deadline=float(deadline) if deadline else None)


if __name__ == "__main__":
    main()
