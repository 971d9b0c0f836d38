"""The suite that ships: tasks of five families, written by code from word lists and grammars. Loads no torch.

The roles are the folders: `meta_training`, `validation` and `held_out` import nothing of each other, so that no sentence
template and no word list stands on two sides of the split. The examples are a pure function of the seed; loading takes
well under a second.
"""

from functools import cache

from manyicl.tasks.builtin import held_out, meta_training, validation
from manyicl.tasks.task import TaskSuite


@cache
def load_builtin_suite(seed: int = 0) -> TaskSuite:
    """The built-in suite; another seed gives the same tasks with other examples."""
    roles = {"meta_training": meta_training.GRAMMARS, "validation": validation.GRAMMARS, "held_out": held_out.GRAMMARS}
    tasks = {grammar.name: grammar.make_task(seed) for grammars in roles.values() for grammar in grammars}
    names = {role: tuple(grammar.name for grammar in grammars) for role, grammars in roles.items()}
    return TaskSuite("builtin", tasks, **names)
