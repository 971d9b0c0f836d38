"""What a study will take, before it starts: seconds by kind of cell and the memory of its largest, from recipe and config alone.

Training is forecast as `manyicl plan` does. An evaluation costs the operations of its prefills and queries (see `planning`) over
the machine's matrix rate, of which `_SHARE` is reached; generation and loading are reckoned at fixed costs. Cells that train on
the examples of one task are taken at eight passes, where most of those of docs/results/study were stopped. A rough figure: within
a factor of two is what to expect.
"""

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from manyicl.dtypes import resolve_dtype
from manyicl.encoding import Encoder
from manyicl.modeling import load_config, load_tokenizer
from manyicl.planning import prefill_operations, prefix_bytes, query_operations, show_bytes
from manyicl.study.cells import Cell
from manyicl.study.recipe import StudyRecipe
from manyicl.tasks.task import Task, TaskSuite
from manyicl.training_plan import PlanRequest, TrainingPlan, plan_recipe

_SHARE = 0.7  # Of the matrix rate, by prefills and queries (docs/results/scoring.md).
_SECONDS_A_CELL = 4.0  # Loading.
_PASSES_A_QUERY = 0.15  # Of generation: a pass for each token, shared by a batch of queries.
_MEASURED_EXAMPLES = 50
_USUAL_PASSES = 8
_BYTES_A_TOKEN = 4
_CHAT_SECONDS = 30.0  # The built-in suite's questions.
_SECONDS_A_DOCUMENT = 0.5  # Of lm-evaluation-harness.


@dataclass(frozen=True)
class Forecast:
    """What is left of a study will take."""

    seconds: dict[str, float]
    num_cells: dict[str, int]
    peak_memory_bytes: int

    @property
    def hours(self) -> float:
        """Of all cells, one after the other."""
        return sum(self.seconds.values()) / 3600


class Forecaster:
    """Knows the machine's rate, a model's config and the lengths of examples."""

    def __init__(self, recipe: StudyRecipe, suite: TaskSuite) -> None:
        self.recipe = recipe
        self.suite = suite
        self.config = load_config(recipe.model)
        self.encoder = Encoder(load_tokenizer(recipe.model))
        self.context = recipe.context_tokens or int(self.config.get_text_config().max_position_embeddings)
        methods = [*recipe.joint_methods(), *(["zero_shot"] if "dedicated" in recipe.methods else [])]
        self._plans: dict[str, TrainingPlan] = {
            method: plan_recipe(recipe.training_recipe(method), PlanRequest()) for method in methods
        }
        self._lengths: dict[str, float] = {}

    def seconds(self, cell: Cell) -> float:
        """Of one cell."""
        own, recipe = cell.kind, self.recipe
        tasks = [cell.task] if cell.task else []
        if own == "rate":
            shots = recipe.rates.shots if "rate" in cell.options else []
            tokens = recipe.budget_tokens * recipe.rates.budget_share * bool(shots)
            evaluated = sum(self._evaluation(task, shots, recipe.rates.num_seeds) for task in self.suite.validation)
            return self._training(cell.method, tokens) + evaluated + _SECONDS_A_CELL
        if own == "train":
            return self._training(cell.method, recipe.budget_tokens) + _SECONDS_A_CELL
        if own == "classic":
            return 1.0
        if own in ("dedicated", "dedicated-rate"):
            tokens = self._dedicated_tokens(cell)
            return self._training("zero_shot", tokens) + self._evaluation(cell.task, [0], 1) + 2 * _SECONDS_A_CELL
        if own == "forgetting":
            window = recipe.forgetting.window_tokens
            num_windows = len(recipe.forgetting.corpora) * recipe.forgetting.max_bytes / _BYTES_A_TOKEN / window
            read = self._operations_seconds(num_windows * prefill_operations(self.config, window))
            return read + _CHAT_SECONDS + _SECONDS_A_CELL
        if own == "harness":
            return len(recipe.forgetting.harness_tasks) * recipe.forgetting.harness_limit * _SECONDS_A_DOCUMENT + _SECONDS_A_CELL
        if own == "robustness":
            conditions = 5 + len(recipe.robustness.flipped) + len(recipe.robustness.contexts)
            return conditions * sum(self._evaluation(task, [recipe.robustness.num_shots], recipe.num_seeds) for task in tasks)
        shots = cell.options.get("shots", recipe.shots)
        shots = [16, "max"] if shots == "best and max" else shots
        num_seeds = cell.options.get("num_seeds", recipe.num_seeds)
        return sum(self._evaluation(task, shots, num_seeds) for task in tasks) + _SECONDS_A_CELL

    def peak_memory_bytes(self) -> int:
        """Of the largest training, or the longest prefix beside the model."""
        prefix = prefix_bytes(self.config, self.context, resolve_dtype(self.recipe.dtype))
        return max([prefix, *(plan.peak_bytes for plan in self._plans.values())])

    def _training(self, method: str, tokens: float) -> float:
        return tokens / self._plans[method].tokens_per_second

    def _dedicated_tokens(self, cell: Cell) -> float:
        """What dedicated tuning feeds until the fifth kept back stops it, at all of its rates."""
        wanted, task = cell.options["examples"], self.suite.tasks[cell.task]
        if wanted == "prefix":
            held = float(self.context)
        else:
            held = self._length(task) * (len(task.train) if wanted == "full" else int(wanted))
        limits = self.recipe.dedicated.for_kind(cell.kind)
        num_rates = 1 if cell.kind == "dedicated-rate" else limits.num_rates
        trained = 0.8 * held  # A fifth is kept back.
        return num_rates * min(limits.max_tokens, trained * min(limits.max_epochs, _USUAL_PASSES))

    def _length(self, task: Task) -> float:
        """Mean tokens of an example."""
        if task.name not in self._lengths:
            own = task.train[:_MEASURED_EXAMPLES]
            self._lengths[task.name] = statistics.fmean(self.encoder.count_example(each.input, each.answer) for each in own)
        return self._lengths[task.name]

    def _evaluation(self, name: str, shots: list[Any], num_seeds: int) -> float:
        """Seconds of a task at some shot counts, over all orders of demonstrations."""
        task = self.suite.tasks[name]
        length = self._length(task)
        is_validation = self.suite.role(name) == "validation"
        asked = self.recipe.num_validation_queries if is_validation else self.recipe.num_queries
        num_queries = min(asked, len(task.test))
        most = min(self.context, length * len(task.train))
        prefixes = [most if count == "max" else min(most, count * length) for count in shots]
        operations = prefill_operations(self.config, max(1, int(max(prefixes, default=1))))
        for prefix in prefixes:
            operations += query_operations(self.config, int(length), prefix_tokens=int(prefix), num_queries=num_queries)
        written = 0.0 if task.is_choice else len(shots) * num_queries * _PASSES_A_QUERY
        return num_seeds * (self._operations_seconds(operations) + written)

    def _operations_seconds(self, operations: float) -> float:
        plan = next(iter(self._plans.values()), None)
        rate = (
            plan.device.matrix_rate
            if plan
            else plan_recipe(self.recipe.training_recipe("all_answers"), PlanRequest()).device.matrix_rate
        )
        return operations / (rate * _SHARE)


def forecast_study(recipe: StudyRecipe, suite: TaskSuite, cells: list[Cell]) -> Forecast:
    """What the given cells will take.

    Raises:
        UserInputError: the model is wrong.
    """
    forecaster = Forecaster(recipe, suite)
    seconds: dict[str, float] = {}
    num_cells: dict[str, int] = {}
    for cell in cells:
        seconds[cell.kind] = seconds.get(cell.kind, 0.0) + forecaster.seconds(cell)
        num_cells[cell.kind] = num_cells.get(cell.kind, 0) + 1
    return Forecast(seconds, num_cells, forecaster.peak_memory_bytes())


def show_forecast(forecast: Forecast, *, done: int, device: torch.device) -> str:
    """A forecast as lines of text."""
    lines = [f"{'cells':16} {'left':>5} {'minutes':>8}"]
    lines += [f"{kind:16} {count:5} {forecast.seconds[kind] / 60:8.0f}" for kind, count in forecast.num_cells.items()]
    lines.append(
        f"{sum(forecast.num_cells.values())} cells left, {done} done; about {forecast.hours:.1f} hours on one {device.type}, "
        f"at most {show_bytes(forecast.peak_memory_bytes)} beside the program (forecast, rough; "
        "at the rate of matrix products measured now, which other work on the machine lowers)"
    )
    return "\n".join(lines)
