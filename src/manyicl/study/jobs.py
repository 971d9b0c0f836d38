"""What each kind of cell does; its folder is its own, and what it found is returned.

Nothing that is chosen is chosen on held-out tasks: rates and shots are read from cells of validation tasks alone.
"""

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from manyicl.classic import ClassicBaseline
from manyicl.config import Recipe
from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine
from manyicl.errors import RecipeError, RecordsError
from manyicl.evaluation import Plan, evaluate_task, order_demonstrations
from manyicl.files import hash_file
from manyicl.forgetting import corpus_loss, read_corpus
from manyicl.methods import CalibratedInContext, InContext
from manyicl.modeling import Format, LoadedModel, load_model, load_tokenizer
from manyicl.packing import RowDataset
from manyicl.records import EvaluationRecord, RecordWriter, Shots, read_records
from manyicl.results.calibrated import CALIBRATED
from manyicl.results.contrasts import Cells, headline_value, terms_at
from manyicl.results.files import BASE, CorpusFacts, HarnessFacts, ModelFacts
from manyicl.results.forgetting_card import CHAT
from manyicl.results.readings import read_method
from manyicl.robustness import evaluate_robustness
from manyicl.runs import train
from manyicl.study.cells import Cell, rate_method, rate_name
from manyicl.study.dedicated import tune_at_rates
from manyicl.study.recipe import StudyRecipe
from manyicl.tasks.readers import load_suite
from manyicl.tasks.task import TaskSuite
from manyicl.versions import library_versions

_MOST_ROWS = 1_000_000


@dataclass(frozen=True)
class Outcome:
    """What a cell found, beside the records in its folder.

    Attributes:
        facts: Other things that later cells ask for, plain JSON.
    """

    models: list[ModelFacts] = field(default_factory=list)
    corpora: list[CorpusFacts] = field(default_factory=list)
    harness: list[HarnessFacts] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class Study:
    """A recipe, its suite and its folder of cells, with the model that was used last kept in memory.

    Args:
        read: Gives the outcome of a finished cell by name.
    """

    def __init__(self, recipe: StudyRecipe, suite: TaskSuite, read: Callable[[str], Outcome]) -> None:
        self.recipe = recipe
        self.suite = suite
        self.output = Path(recipe.output)
        self.read = read
        self._loaded: tuple[str, LoadedModel] | None = None

    def folder(self, cell: str) -> Path:
        """The folder of a cell."""
        return self.output / "cells" / cell

    def records(self, cell: str) -> list[EvaluationRecord]:
        """The records of a cell; none where there is no file."""
        path = self.folder(cell) / "records.jsonl"
        return read_records(path) if path.is_file() else []

    def run(self, cell: Cell) -> Outcome:
        """Do what a cell says."""
        jobs = {
            "rate": self._search_rate,
            "train": self._train,
            "evaluate": self._evaluate,
            "forgetting": self._measure_forgetting,
            "harness": self._run_harness,
            "dedicated-rate": self._tune_dedicated,
            "dedicated": self._tune_dedicated,
            "classic": self._evaluate_classic,
            "robustness": self._evaluate_robustness,
            "calibrated": self._evaluate_calibrated,
        }
        return jobs[cell.kind](cell)

    # Training

    def _search_rate(self, cell: Cell) -> Outcome:
        """Train at one rate for a share of the budget, and score on the validation tasks; the extension only if it is wanted."""
        rates = self.recipe.rates
        rate = cell.options.get("rate") or extended_rate(self._rate_scores(cell), rates.extension)
        if rate is None:
            return Outcome(facts={"rate": None, "score": None})
        tokens = max(1, round(rates.budget_share * self.recipe.budget_tokens))
        recipe = self._training_recipe(cell.method, cell, rate, tokens=tokens, num_snapshots=1)
        train(recipe, resume=True)
        plan = self._plan(f"{cell.method}/rate-{rate_name(rate)}", tuple(rates.shots), num_seeds=rates.num_seeds)
        records = self._evaluate_model(recipe.output, cell, self.suite.validation, plan)
        score = best_score(records, plan.model, self.suite.validation, rates.shots)
        return Outcome(facts={"rate": rate, "score": score})

    def _rate_scores(self, cell: Cell) -> dict[float, float]:
        """Scores of a method's rates that are done."""
        found = [self.read(f"rate/{cell.method}/{rate_name(rate)}").facts for rate in self.recipe.rates.values]
        return {facts["rate"]: facts["score"] for facts in found}

    def chosen_rate(self, method: str) -> float:
        """The rate with the highest score on the validation tasks, the lower one of equals."""
        own = rate_method(self.recipe, method)
        scores = self._rate_scores(Cell("", method=own))
        extension = self.read(f"rate/{own}/extension").facts
        if extension["rate"] is not None:
            scores[extension["rate"]] = extension["score"]
        return max(sorted(scores), key=lambda rate: scores[rate])

    def _training_recipe(self, method: str, cell: Cell, rate: float, *, tokens: int, num_snapshots: int) -> Recipe:
        """The training recipe of a cell, with as many updates as its budget of tokens takes."""
        family = self.recipe.held_out_family
        changes: dict[str, Any] = {
            "output": str(self.folder(cell.name) / "run"),
            "seed": cell.options.get("seed", self.recipe.seed),
        }
        if cell.options.get("family") and family:
            changes["meta_training"] = [name for name in self.suite.meta_training if name not in family.meta_training_without]
        recipe = self.recipe.training_recipe(method, training={"learning_rate": rate}, **changes)
        num_steps = max(num_snapshots, count_updates(recipe, self.suite, tokens))
        save_every = num_steps // num_snapshots
        saving = {"num_steps": num_steps, "save_every": save_every, "keep_checkpoints": num_steps // save_every + 1}
        return self.recipe.training_recipe(method, training={"learning_rate": rate} | saving, **changes)

    def _train(self, cell: Cell) -> Outcome:
        """Spend the whole budget at the chosen rate."""
        rate, num_snapshots = self.chosen_rate(cell.method), self.recipe.num_snapshots
        recipe = self._training_recipe(cell.method, cell, rate, tokens=self.recipe.budget_tokens, num_snapshots=num_snapshots)
        result = train(recipe, resume=True)
        name = cell.name.partition("/")[2]
        updates = [number * recipe.training.save_every for number in range(1, num_snapshots)] + [result.updates]
        models = []
        for number, (update, counts) in enumerate(zip(updates, count_examples(recipe, self.suite, updates), strict=True), 1):
            is_final = number == num_snapshots
            progress = json.loads((checkpoint_folder(recipe.output, update) / "progress.json").read_text(encoding="utf-8"))
            models.append(
                ModelFacts(
                    model=name if is_final else f"{name}/{number}of{num_snapshots}",
                    method=cell.method,
                    setting="family" if cell.options["family"] else "held_out",
                    training_seed=cell.options["seed"],
                    learning_rate=rate,
                    updates=update,
                    seconds=progress["seconds"],
                    peak_memory_bytes=result.peak_memory_bytes,
                    is_final=is_final,
                    **counts,
                )
            )
        return Outcome(
            models=models,
            facts={
                "snapshots": {model.model: model.updates for model in models},
                "weights": {model.model: hash_weights(checkpoint_folder(recipe.output, model.updates)) for model in models},
            },
        )

    def _tune_dedicated(self, cell: Cell) -> Outcome:
        """Tune on one task's examples, and evaluate without demonstrations."""
        task, seed, wanted = self.suite.tasks[cell.task], cell.options.get("seed", 0), cell.options["examples"]
        order = order_demonstrations(task, seed)
        if wanted == "prefix":
            base = self._method(BASE, cell.method)
            opened = base.open(task, order, task.test[: self._num_queries(cell.task)])
            order = order[: opened.num_demonstrations]
        elif wanted != "full":
            order = order[: int(wanted)]
        rates = [cell.options["rate"]] if "rate" in cell.options else self._dedicated_rates()
        recipe = self.recipe.model_copy(update={"dedicated": self.recipe.dedicated.for_kind(cell.kind)})
        runs = tune_at_rates(recipe, task, order, rates=rates, seed=seed, folder=self.folder(cell.name) / "run")
        run = min(runs, key=lambda each: each.kept_back_loss)
        plan = self._plan(cell.name, (0,), num_seeds=seed + 1)
        records = self._evaluate_model(str(run.folder), cell, [cell.task], plan, seeds=[seed])
        facts = ModelFacts(
            model=cell.name,
            method=cell.method,
            task=cell.task,
            num_examples=run.num_examples,
            training_seed=seed,
            learning_rate=run.rate,
            updates=run.result.updates,
            tokens=run.result.tokens,
            answers=run.result.answers,
            target_answers=run.result.answers,
            seconds=sum(each.result.seconds for each in runs),  # The rates that were not taken cost too.
            peak_memory_bytes=max(each.result.peak_memory_bytes for each in runs),
            is_final=True,
        )
        losses = {rate_name(each.rate): each.kept_back_loss for each in runs}
        return Outcome(models=[facts], facts={"rate": run.rate, "score": records[0].value, "kept_back_losses": losses})

    def _dedicated_rates(self) -> list[float]:
        """The rates with the highest mean scores over dedicated models of the validation tasks, the lower one of equals first."""
        rates = sorted(self.recipe.dedicated.rates)
        tasks = self.suite.validation
        scores = {
            rate: statistics.fmean(self.read(f"dedicated-rate/{task}/{rate_name(rate)}").facts["score"] for task in tasks)
            for rate in rates
        }
        return sorted(rates, key=lambda rate: -scores[rate])[: self.recipe.dedicated.num_rates]

    # Evaluation

    def _evaluate(self, cell: Cell) -> Outcome:
        """A model on one task, at the shots of the study or those that the cell names."""
        model = cell.name.partition("/")[2].partition(f"/{cell.task}")[0]
        shots = cell.options.get("shots", self.recipe.shots)
        if shots == "best and max":
            shots = list(dict.fromkeys([self._best_shots(cell.options["final"]), "max"]))
        plan = self._plan(model, tuple(shots), num_seeds=cell.options.get("num_seeds"))
        self._evaluate_model(self._model_path(model), cell, [cell.task], plan)
        return Outcome()

    def _best_shots(self, model: str) -> Shots:
        """The shots with the highest headline on the validation tasks."""
        records = [record for task in self.suite.validation for record in self.records(f"evaluate/{model}/{task}")]
        reading = read_method(Cells(records), "", model, self.recipe.shots)
        if reading is None:
            raise RecordsError(f"{self.output}: the validation tasks of {model} are not evaluated whole. Run the study again.")
        return reading.best_shots

    def _model_path(self, model: str) -> str:
        """Where the weights of a model of the records stand."""
        if model == BASE:
            return self.recipe.model
        *parents, last = model.split("/")
        if "of" not in last or not last[0].isdecimal():
            return str(self.folder(f"train/{model}") / "run")
        final = "/".join(parents)
        update = self.read(f"train/{final}").facts["snapshots"][model]
        return str(checkpoint_folder(str(self.folder(f"train/{final}") / "run"), update))

    def _load(self, path: str) -> LoadedModel:
        """A model; the one before it is let go."""
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = None
            self._loaded = (path, load_model(path, dtype=self.recipe.dtype))
        return self._loaded[1]

    def _method(self, path: str, name: str, *, format: Format = "plain") -> InContext:
        loaded = self._load(self.recipe.model if path == BASE else path)
        encoder = Encoder(loaded.tokenizer, format=format)
        return InContext(NativeEngine(loaded, encoder, context_tokens=self.recipe.context_tokens), name=name)

    def _plan(self, model: str, shots: tuple[Shots, ...], *, num_seeds: int | None = None, condition: str = "") -> Plan:
        return Plan(
            shots=shots,
            num_seeds=self.recipe.num_seeds if num_seeds is None else num_seeds,
            num_queries=self.recipe.num_queries,
            model=model,
            versions=tuple(library_versions().items()),
            condition=condition,
        )

    def _evaluate_model(
        self, path: str, cell: Cell, tasks: Sequence[str], plan: Plan, *, seeds: Sequence[int] | None = None
    ) -> list[EvaluationRecord]:
        """The records of a model on tasks, in the cell's folder; those that are there are not made again."""
        return self._evaluate_on(tasks, self._method(path, cell.method), cell, plan, seeds=seeds)

    def _evaluate_on(
        self, tasks: Sequence[str], method: InContext, cell: Cell, plan: Plan, *, seeds: Sequence[int] | None = None
    ) -> list[EvaluationRecord]:
        plan = replace(plan, model_note=method.engine.loaded.note)
        writer = RecordWriter(self.folder(cell.name) / "records.jsonl")
        found: list[EvaluationRecord] = []
        for name in tasks:
            task, role = self.suite.tasks[name], self.suite.role(name)
            own = replace(plan, num_queries=self._num_queries(name))
            found += evaluate_task(method, task, role, plan=own, writer=writer, seeds=seeds)
        return found

    def _num_queries(self, task: str) -> int:
        is_validation = self.suite.role(task) == "validation"
        return self.recipe.num_validation_queries if is_validation else self.recipe.num_queries

    def _evaluate_classic(self, cell: Cell) -> Outcome:
        """TF-IDF from the same demonstrations; without any it knows nothing, and 0 shots are left out."""
        plan = self._plan("classic", tuple(shots for shots in self.recipe.shots if shots != 0))
        writer = RecordWriter(self.folder(cell.name) / "records.jsonl")
        task, plan = self.suite.tasks[cell.task], replace(plan, num_queries=self._num_queries(cell.task))
        list(evaluate_task(ClassicBaseline(), task, self.suite.role(cell.task), plan=plan, writer=writer))
        return Outcome()

    def _evaluate_robustness(self, cell: Cell) -> Outcome:
        model, settings = cell.name.partition("/")[2].rpartition("/")[0], self.recipe.robustness
        conditions = ["order:shuffled", "order:grouped", "order:reversed", *(f"flipped:{share:g}" for share in settings.flipped)]
        method = self._method(self._model_path(model), cell.method)
        conditions += ["symbols", "nearest"]
        conditions += [f"context:{size}" for size in settings.contexts if size <= method.engine.context_tokens]
        plan = replace(self._plan(model, (settings.num_shots,)), model_note=method.engine.loaded.note)
        writer = RecordWriter(self.folder(cell.name) / "records.jsonl")
        task = self.suite.tasks[cell.task]
        role = self.suite.role(cell.task)
        list(evaluate_robustness(method, task, role, plan=plan, writer=writer, conditions=conditions))
        return Outcome()

    def _evaluate_calibrated(self, cell: Cell) -> Outcome:
        """A model on one label task, its scores calibrated, at the shots of the study or those that the cell names."""
        model = cell.name.partition("/")[2].rpartition("/")[0]
        plain = self._method(self._model_path(model), cell.method)
        method = CalibratedInContext(plain.engine, name=cell.method)
        plan = self._plan(model, tuple(cell.options.get("shots", self.recipe.shots)), condition=CALIBRATED)
        self._evaluate_on([cell.task], method, cell, plan)
        return Outcome()

    def _measure_forgetting(self, cell: Cell) -> Outcome:
        """Bits of plain text, window by window, and the built-in suite's questions in the chat format without demonstrations."""
        model, settings = cell.name.partition("/")[2], self.recipe.forgetting
        method = self._method(self._model_path(model), cell.method, format="chat")
        corpora = []
        for path in map(Path, settings.corpora):
            text = read_corpus(path, max_bytes=settings.max_bytes)
            loss = corpus_loss(method.engine.loaded, text, window_tokens=settings.window_tokens)
            facts = {"num_bytes": loss.num_bytes, "window_bits": list(loss.window_bits)}
            corpora.append(CorpusFacts(model=model, method=cell.method, corpus=path.name, **facts))
        plan = replace(self._plan(model, (0,), num_seeds=1, condition=CHAT), num_queries=settings.num_queries)
        writer = RecordWriter(self.folder(cell.name) / "records.jsonl")
        for name, task in load_suite("builtin").tasks.items():
            list(evaluate_task(method, replace(task, name=f"builtin/{name}"), "builtin", plan=plan, writer=writer))
        return Outcome(corpora=corpora)

    def _run_harness(self, cell: Cell) -> Outcome:
        """Tasks of lm-evaluation-harness; it fails, and says why, where that or its data sets cannot be reached."""
        from manyicl.lm_eval_adapter import evaluate_harness_tasks

        model, settings = cell.name.partition("/")[2], self.recipe.forgetting
        path = self._model_path(model)
        scores = evaluate_harness_tasks(
            path,
            settings.harness_tasks,
            dtype=self.recipe.dtype,
            include_path=settings.harness_path,
            limit=settings.harness_limit,
        )
        return Outcome(harness=[HarnessFacts(model=model, method=cell.method, **asdict(score)) for score in scores])


def checkpoint_folder(run: str, update: int) -> Path:
    """Where a run's weights after so many updates stand."""
    return Path(run) / "checkpoints" / f"checkpoint-{update}"


def hash_weights(folder: Path) -> str:
    """A hash of the safetensors files in a folder."""
    return hashlib.sha256("".join(hash_file(path) for path in sorted(folder.glob("*.safetensors"))).encode()).hexdigest()


def extended_rate(scores: Mapping[float, float], factor: float) -> float | None:
    """The rate beyond a winning edge; None where the winner is inside, or was the only one."""
    rates = sorted(scores)
    best = max(rates, key=lambda rate: scores[rate])
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    return best / factor if best == rates[0] else best * factor


def best_score(records: Sequence[EvaluationRecord], model: str, tasks: Sequence[str], shots: Sequence[Shots]) -> float:
    """The headline of the tasks at the best of the shot counts, in points."""
    cells = Cells(records)
    found = [headline_value(terms) for count in shots if (terms := terms_at(cells, tasks, [(1.0, model, count)]))]
    return max(found)


def count_updates(recipe: Recipe, suite: TaskSuite, tokens: int) -> int:
    """Updates until at least so many tokens have been fed."""
    fed, rows = 0, _rows(recipe, suite)
    for number, row in enumerate(rows, 1):
        fed += row.num_tokens
        if fed >= tokens:
            return -(-number // recipe.training.rows_per_step)
    raise RecipeError(f"a budget of {tokens} tokens takes more than {_MOST_ROWS} rows. Lower budget_tokens.")


def count_examples(recipe: Recipe, suite: TaskSuite, updates: Sequence[int]) -> list[dict[str, int]]:
    """Tokens, answers and answers that are targets, up to each of some ascending numbers of updates."""
    counts, found = {"tokens": 0, "answers": 0, "target_answers": 0}, []
    wanted = [update * recipe.training.rows_per_step for update in updates]
    for number, row in enumerate(_rows(recipe, suite), 1):
        counts["tokens"] += row.num_tokens
        counts["answers"] += row.num_answers
        counts["target_answers"] += len(row.sequences) if recipe.objective.name == "last_answer" else row.num_answers
        found += [dict(counts)] * wanted.count(number)
        if number == wanted[-1]:
            break
    return found


def _rows(recipe: Recipe, suite: TaskSuite) -> RowDataset:
    """The rows of a run, without an end."""
    names = suite.meta_training if recipe.meta_training is None else recipe.meta_training
    tasks = [suite.tasks[name] for name in names]
    encoder = Encoder(load_tokenizer(recipe.model), format=recipe.episodes.format)
    return RowDataset(tasks, config=recipe.episodes, encoder=encoder, seed=recipe.seed, num_rows=_MOST_ROWS)
