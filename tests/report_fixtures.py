"""Results of a study that never was, drawn from known chances by a seed through the typed files of real ones; a report's page."""

import csv
import io
import urllib.parse
from collections.abc import Sequence
from html.parser import HTMLParser

import numpy as np

from manyicl.records import EvaluationRecord, QueryScores, Shots
from manyicl.results.claims import make_claims
from manyicl.results.files import CellFacts, CorpusFacts, HarnessFacts, ModelFacts, StudyResults

EVIL = "<script>alert('task')</script>"
SHOTS: tuple[Shots, ...] = (0, 4, 16, "max")
# Task -> family, role, metric, labels (0 for free text).
TASKS = {
    "snli": ("nli", "validation", "accuracy", 3),
    "irony": ("classification", "validation", "macro_f1", 2),
    "sick": ("nli", "held_out", "accuracy", 3),
    "rte": ("nli", "held_out", "accuracy", 2),
    "trec": ("classification", "held_out", "macro_f1", 4),
    "spam": ("classification", "held_out", "accuracy", 2),
    EVIL: ("qa", "held_out", "token_f1", 0),
    "svamp": ("math", "held_out", "numeric_match", 0),
}
# Method -> chance of a right answer at 0 shots, and what a doubling adds; zero-shot tuning is best without demonstrations.
METHODS = {
    "in_context": (0.20, 0.03),
    "zero_shot": (0.45, -0.01),
    "few_shot_5": (0.35, 0.05),
    "all_answers": (0.40, 0.08),
}
TOKENS = 150_000


def make_record(
    model: str,
    method: str,
    task: str,
    shots: Shots,
    *,
    seed: int = 0,
    chance: float = 0.5,
    condition: str = "",
    num_queries: int = 20,
) -> EvaluationRecord:
    """A record whose queries are right by chance; the same queries are easy for every method."""
    family, role, metric, num_labels = TASKS.get(task, ("chat", "builtin", "accuracy", 2))
    easy = np.random.default_rng([7, len(task), *task.encode()]).random(num_queries)
    luck = np.random.default_rng([seed, *f"{model}/{task}/{shots}/{condition}".encode()]).random(num_queries)
    right = (0.7 * easy + 0.3 * luck) < chance
    gold = [number % num_labels for number in range(num_queries)] if num_labels else [-1] * num_queries
    predicted = [
        (label if good else (label + 1) % num_labels) if num_labels else -1 for label, good in zip(gold, right, strict=True)
    ]
    return EvaluationRecord(
        method=method,
        model=model,
        model_note="dequantised from Q4_1",
        task=task,
        family=family,
        role=role,
        metric=metric,
        shots=shots,
        num_demonstrations=48 + seed if shots == "max" else shots,
        seed=seed,
        condition=condition,
        value=float(right.mean()),
        num_queries=num_queries,
        prefix_tokens=1900 if shots == "max" else 30 * shots,
        query_tokens=40 * num_queries,
        seconds=1.5,
        prefill_seconds=2.0,
        fingerprint="synthetic",
        versions={"manyicl": "0.1.0", "torch": "2.13.0+cpu"},
        queries=QueryScores(ids=list(range(num_queries)), scores=[float(each) for each in right], gold=gold, predicted=predicted),
    )


def chance_of(method: str, shots: Shots, *, share: float = 1.0) -> float:
    """A method's chance after a share of its training."""
    start, gain = METHODS[method]
    base, base_gain = METHODS["in_context"]
    doublings = np.log2(1 + (48 if shots == "max" else shots))
    return min(0.95, base + base_gain * doublings + share * ((start - base) + (gain - base_gain) * doublings))


def model_of(method: str, *, seed: int = 0, snapshot: int = 0) -> str:
    if method == "in_context":
        return "base"
    return f"{method}/seed-{seed}" + (f"/{snapshot}of3" if snapshot else "")


def evaluated(
    method: str, model: str, tasks: Sequence[str], shots: Sequence[Shots], *, share: float = 1.0
) -> list[EvaluationRecord]:
    return [
        make_record(model, method, task, count, seed=seed, chance=chance_of(method, count, share=share))
        for task in tasks
        for count in shots
        for seed in range(3)
    ]


def study_records(methods: Sequence[str]) -> list[EvaluationRecord]:
    """Validation and held-out tasks of every method, snapshots, further training seeds."""
    held_out = [task for task, facts in TASKS.items() if facts[1] == "held_out"]
    records = []
    for method in methods:
        records += evaluated(method, model_of(method), list(TASKS), SHOTS)
        if method == "in_context":
            continue
        for snapshot in (1, 2):
            records += evaluated(method, model_of(method, snapshot=snapshot), held_out, SHOTS, share=snapshot / 3)
        if method != "few_shot_5":
            records += evaluated(method, model_of(method, seed=1), held_out, (0, "max"), share=0.9)
    return records


def side_records() -> list[EvaluationRecord]:
    """Altered demonstrations, chat questions, TF-IDF, dedicated tuning and a family left out."""
    records = []
    for method in ("in_context", "all_answers"):
        for condition, less in (
            ("order:shuffled", 0.0),
            ("order:grouped", 0.15),
            ("order:reversed", 0.02),
            ("flipped:0.1", 0.03),
            ("flipped:0.5", 0.3),
            ("symbols", 0.2),
            ("nearest", -0.05),
        ):
            chance = chance_of(method, 16) - less
            records += [
                make_record(model_of(method), method, task, 16, seed=seed, chance=chance, condition=condition)
                for task in ("sick", "trec")
                for seed in range(3)
            ]
        records += [
            make_record(model_of(method), method, task, "max", chance=0.6, condition=f"context:{size}")
            for task in ("sick", "trec")
            for size in (2048, 4096)
        ]
        records.append(make_record(model_of(method), method, "builtin/x", 0, chance=0.5, condition="chat"))
    held_out = [task for task, facts in TASKS.items() if facts[1] == "held_out"]
    for task in held_out:
        records += [
            make_record("classic", "classic", task, count, seed=seed, chance=0.5) for count in SHOTS[1:] for seed in range(3)
        ]
        records.append(make_record(f"dedicated/{task}/full", "dedicated_full", task, 0, chance=0.85))
        for seed in range(3):
            name = f"dedicated/{task}/prefix-{seed}"
            records.append(make_record(name, "dedicated_prefix", task, 0, seed=seed, chance=0.6))
    for seed in range(3):
        records.append(make_record(f"dedicated/sick/4-{seed}", "dedicated_4", "sick", 0, seed=seed, chance=0.3))
        records.append(make_record(f"dedicated/sick/16-{seed}", "dedicated_16", "sick", 0, seed=seed, chance=0.9))
    for method, chance in (("all_answers", 0.7), ("few_shot_5", 0.5), ("few_shot_16", 0.6)):
        records += [
            make_record(f"{method}/family/seed-0", method, task, "max", seed=seed, chance=chance)
            for task in ("sick", "rte")
            for seed in range(3)
        ]
    return records


def model_facts(
    model: str, method: str, *, share: float = 1.0, seed: int = 0, setting: str = "held_out", task: str = ""
) -> ModelFacts:
    targets = {"zero_shot": 1600, "few_shot_5": 300}.get(method, 1500)
    return ModelFacts(
        model=model,
        method=method,
        setting=setting,
        task=task,
        num_examples=64 if task else None,
        training_seed=seed,
        learning_rate=6e-4,
        updates=round(75 * share),
        tokens=round(TOKENS * share),
        answers=round(1600 * share),
        target_answers=round(targets * share),
        seconds=200.0 * share,
        peak_memory_bytes=3 * 2**29,
        is_final=share == 1.0,
    )


def study_models(methods: Sequence[str]) -> list[ModelFacts]:
    models = []
    for method in methods:
        if method == "in_context":
            continue
        models += [model_facts(model_of(method, snapshot=number), method, share=number / 3) for number in (1, 2)]
        models.append(model_facts(model_of(method), method))
        if method != "few_shot_5":
            models.append(model_facts(model_of(method, seed=1), method, seed=1))
    left_out = ("all_answers", "few_shot_5", "few_shot_16")
    models += [model_facts(f"{method}/family/seed-0", method, setting="family") for method in left_out]
    return [*models, model_facts("dedicated/sick/full", "dedicated_full", task="sick")]


def study_corpora(models: Sequence[ModelFacts]) -> list[CorpusFacts]:
    """Two plain texts; a model loses more the longer it is tuned."""
    corpora = []
    lost = {"in_context": 0.0, "zero_shot": 0.030, "few_shot_5": 0.008, "all_answers": 0.015}
    known = [("base", "in_context", 0.0), *((facts.model, facts.method, facts.updates / 75) for facts in models)]
    for model, method, share in known:
        if method not in lost or "family" in model:
            continue
        for number, corpus in enumerate(("wikipedia.txt", "novels.txt")):
            draw = np.random.default_rng([number, 3])
            bits = 900 + 60 * draw.random(20) + 1000 * lost[method] * share * (1 + 0.2 * draw.random(20))
            corpora.append(CorpusFacts(model=model, method=method, corpus=corpus, num_bytes=20_000, window_bits=bits.tolist()))
    return corpora


def study_cells() -> list[CellFacts]:
    done = [
        CellFacts(cell=f"train/{method}/seed-0", kind="train", status="done", seconds=260.0, peak_memory_bytes=3 * 2**29)
        for method in METHODS
    ]
    done += [
        CellFacts(cell=f"evaluate/{method}/{task}", kind="evaluate", status="done", seconds=41.0)
        for method in METHODS
        for task in TASKS
    ]
    failed = CellFacts(cell="robustness/base/rte", kind="robustness", status="failed", seconds=3.0, error="<b>out of memory</b>")
    return [*done, failed, CellFacts(cell="dedicated/rte/full", kind="dedicated", status="open")]


def harness_facts() -> list[HarnessFacts]:
    """One task of lm-evaluation-harness under the base and two tuned models."""
    scores = {"base": ("in_context", 0.5), "all_answers/seed-0": ("all_answers", 0.45), "zero_shot/seed-0": ("zero_shot", 0.3)}
    return [
        HarnessFacts(model=model, method=method, task="piqa", metric="acc", value=value, standard_error=0.02)
        for model, (method, value) in scores.items()
    ]


def study_results(methods: Sequence[str] = tuple(METHODS), *, with_sides: bool = True) -> StudyResults:
    """Results of the synthetic study with its claims; `methods` may be fewer, and sides left out."""
    models = study_models(methods)
    results = StudyResults(
        recipe={
            "model": "default",
            "shots": list(SHOTS),
            "budget_tokens": TOKENS,
            "context_tokens": 2048,
            "held_out_family": {"family": "nli", "held_out": ["sick", "rte"]} if with_sides else None,
            "notes": ["The default model has probably seen <i>some</i> public sets."],
        },
        records=study_records(methods) + (side_records() if with_sides else []),
        models=models if with_sides else [facts for facts in models if facts.setting == "held_out" and not facts.task],
        corpora=study_corpora(models) if with_sides else [],
        cells=study_cells() if with_sides else [],
        harness=harness_facts() if with_sides else [],
    )
    return results.model_copy(update={"claims": make_claims(results)})


class Page(HTMLParser):
    """The text of a page, its tables by the CSV that stands below each, and all its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tables: dict[str, tuple[list[list[tuple[str, str]]], str]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.best: list[str] = []
        self._rows: list[list[tuple[str, str]]] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in known.items()]
        self._inside.append(tag)
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append((known.get("data-value", ""), ""))
            if "best" in known.get("class", ""):
                self.best.append(known["data-value"])
        elif tag == "a" and "download" in known:
            self.tables[known["download"].removesuffix(".csv")] = (self._rows, known["href"])

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if {"script", "style"} & set(self._inside):
            return
        self.text.append(data)
        if {"th", "td"} & set(self._inside):
            value, shown = self._rows[-1][-1]
            self._rows[-1][-1] = (value, shown + data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def csv(self, key: str) -> list[list[str]]:
        prefix, _, content = self.tables[key][1].partition(",")
        assert prefix == "data:text/csv;charset=utf-8"
        return list(csv.reader(io.StringIO(urllib.parse.unquote(content), newline="")))
