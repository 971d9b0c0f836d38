"""Many-shot in-context fine-tuning: one language model for many text tasks, tuned once with the loss on every answer.

Public names are loaded when they are first used (PEP 562), so that `import manyicl` loads neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyicl.config import Recipe, load_recipe
    from manyicl.encoding import Encoder
    from manyicl.estimator import ManyShotClassifier, ManyShotGenerator
    from manyicl.label_search import find_best_labels
    from manyicl.modeling import LoadedModel, export_model, load_model, push_to_hub
    from manyicl.prediction import predict
    from manyicl.prefix import Prefix, extend, prefill, quantise
    from manyicl.prefix_files import PrefixFacts, identify_prefix, load_prefix, save_prefix
    from manyicl.prefix_store import PrefixStore
    from manyicl.runs import EvaluationRequest, evaluate_models, train
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
    "PrefixFacts": "prefix_files",
    "PrefixStore": "prefix_store",
    "Recipe": "config",
    "Task": "tasks.task",
    "TaskSuite": "tasks.task",
    "check_suite": "tasks.checks",
    "check_task": "tasks.checks",
    "evaluate_models": "runs",
    "export_model": "modeling",
    "extend": "prefix",
    "find_best_labels": "label_search",
    "generate_answers": "scoring",
    "identify_prefix": "prefix_files",
    "load_model": "modeling",
    "load_prefix": "prefix_files",
    "load_recipe": "config",
    "load_suite": "tasks.readers",
    "load_task": "tasks.readers",
    "predict": "prediction",
    "prefill": "prefix",
    "push_to_hub": "modeling",
    "quantise": "prefix",
    "read_examples": "tasks.readers",
    "save_prefix": "prefix_files",
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
    "PrefixFacts",
    "PrefixStore",
    "Recipe",
    "Task",
    "TaskSuite",
    "check_suite",
    "check_task",
    "evaluate_models",
    "export_model",
    "extend",
    "find_best_labels",
    "generate_answers",
    "identify_prefix",
    "load_model",
    "load_prefix",
    "load_recipe",
    "load_suite",
    "load_task",
    "predict",
    "prefill",
    "push_to_hub",
    "quantise",
    "read_examples",
    "save_prefix",
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
