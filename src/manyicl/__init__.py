"""Many-shot in-context fine-tuning: one language model for many text tasks, tuned once with the loss on every answer.

Public names are loaded when they are first used (PEP 562), so that `import manyicl` loads neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyicl.config import Recipe, load_recipe
    from manyicl.encoding import Encoder
    from manyicl.estimator import ManyShotClassifier, ManyShotGenerator
    from manyicl.modeling import LoadedModel, export_model, load_model, push_to_hub
    from manyicl.prefix import Prefix, extend, prefill
    from manyicl.runs import EvaluationRequest, evaluate_models, predict, train
    from manyicl.scoring import generate_answers, score_labels
    from manyicl.tasks.checks import check_suite, check_task
    from manyicl.tasks.readers import load_suite, load_task, read_examples
    from manyicl.tasks.task import Example, Task, TaskSuite

__version__ = "0.1.0"

_HOMES = {
    "Encoder": "encoding",
    "EvaluationRequest": "runs",
    "Example": "tasks.task",
    "LoadedModel": "modeling",
    "ManyShotClassifier": "estimator",
    "ManyShotGenerator": "estimator",
    "Prefix": "prefix",
    "Recipe": "config",
    "Task": "tasks.task",
    "TaskSuite": "tasks.task",
    "check_suite": "tasks.checks",
    "check_task": "tasks.checks",
    "evaluate_models": "runs",
    "export_model": "modeling",
    "extend": "prefix",
    "generate_answers": "scoring",
    "load_model": "modeling",
    "load_recipe": "config",
    "load_suite": "tasks.readers",
    "load_task": "tasks.readers",
    "predict": "runs",
    "prefill": "prefix",
    "push_to_hub": "modeling",
    "read_examples": "tasks.readers",
    "score_labels": "scoring",
    "train": "runs",
}

__all__ = [
    "Encoder",
    "EvaluationRequest",
    "Example",
    "LoadedModel",
    "ManyShotClassifier",
    "ManyShotGenerator",
    "Prefix",
    "Recipe",
    "Task",
    "TaskSuite",
    "check_suite",
    "check_task",
    "evaluate_models",
    "export_model",
    "extend",
    "generate_answers",
    "load_model",
    "load_recipe",
    "load_suite",
    "load_task",
    "predict",
    "prefill",
    "push_to_hub",
    "read_examples",
    "score_labels",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'manyicl' has no attribute {name!r}")
    return getattr(importlib.import_module(f"manyicl.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
