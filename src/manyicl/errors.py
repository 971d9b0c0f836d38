"""Every error that manyicl raises on purpose.

A message says what was seen (with sizes, file and line where there is one) and then what to do.

    ManyICLError
    ├── UserInputError        what was given is wrong: CLI exit code 2, HTTP 400
    │   ├── TaskError         a task folder, file, line, field or label
    │   ├── RecipeError       a recipe file, key or value
    │   ├── BudgetError       examples and token budgets that do not go together
    │   ├── ModelError        a model name, folder, tokenizer or dtype
    │   ├── RecordsError      a file of records
    │   ├── PrefixError       a saved prefix: of another model, torn or damaged
    │   └── StorageError      a full disk, a folder that cannot be written
    ├── CheckpointError       a checkpoint that does not hold what its manifest says
    ├── OverloadedError       a queue that is full, a service that stops: HTTP 429
    └── DeadlineError         a query whose time is up: HTTP 504
"""


class ManyICLError(Exception):
    """Base of every error raised on purpose."""


class UserInputError(ManyICLError):
    """Something given by the user is wrong; the message says how to mend it."""


class TaskError(UserInputError):
    """A task folder, file, line, field or label is wrong."""


class RecipeError(UserInputError):
    """A recipe file, key or value is wrong."""


class BudgetError(UserInputError):
    """The examples do not go together with the token budget."""


class ModelError(UserInputError):
    """A model cannot be found, loaded or used as asked."""


class RecordsError(UserInputError):
    """A file of evaluation records cannot be used as asked."""


class PrefixError(UserInputError):
    """A prefix is damaged, is not one of this model, or is rounded and cannot be extended."""


class StorageError(UserInputError):
    """A file or folder cannot be written."""


class CheckpointError(ManyICLError):
    """A checkpoint does not hold what its manifest says."""


class OverloadedError(ManyICLError):
    """More is waiting than can be served soon.

    Args:
        retry_after_seconds: When there is probably room again.
    """

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeadlineError(ManyICLError):
    """The time that a query was given is up."""
