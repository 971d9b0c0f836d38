"""The sections of a study's page, on results of a study that never was."""

import statistics
from typing import Any

import pytest

from manyicl.errors import UserInputError
from manyicl.results.contrasts import Term, estimate
from manyicl.results.files import StudyResults
from manyicl.study.recipe import DedicatedConfig, ForgettingConfig, StudyRecipe
from report_fixtures import study_results
from result_fixtures import load_benchmark


@pytest.fixture(scope="module")
def page() -> Any:
    return load_benchmark("study_page")


@pytest.fixture(scope="module")
def results() -> StudyResults:
    return study_results()


def test_overtaking_says_how_many_examples_ours_holds(page: Any, results: StudyResults) -> None:
    rows = page.overtaking_lines(results.claims["overtaking"])[2:]
    assert [row.split(" | ")[:3] for row in rows] == [
        [f"| {point['task']}", str(point["examples"]), str(point["our_demonstrations"])]
        for point in results.claims["overtaking"]
        if point["ours"]
    ]
    assert rows[-1].startswith("| sick | all | 48 | ")
    assert page.overtaking_lines([]) == ["Not evaluated yet."]


def test_a_study_of_dedicated_tuning_alone_is_read_beside_another(page: Any, results: StudyResults) -> None:
    """Its models are right on everything; of the other study's, whose place they take, nothing is left."""
    others = [record for record in results.records if record.method.startswith("dedicated")]
    taken = [record for record in others if record.method == "dedicated_16"]
    own = [record.model_copy(update={"scores": [1.0] * record.num_queries, "value": 1.0}) for record in taken]
    recipe = StudyRecipe(methods=["dedicated"], dedicated=DedicatedConfig(overtaking_tasks=["sick"])).model_dump(mode="json")
    results = results.model_copy(update={"recipe": recipe | results.recipe})
    recipe |= {key: results.recipe[key] for key in ("model", "context_tokens")}
    joined = page.join_results(results.model_copy(update={"records": own, "models": [], "recipe": recipe}), results)
    assert [record for record in joined.records if record.method.startswith("dedicated")] == own
    assert len(joined.records) == len(results.records) - len(others) + len(own)
    assert {facts.method for facts in results.models} - {facts.method for facts in joined.models} == {"dedicated_full"}
    claims = page.make_claims(joined)
    assert [(point["examples"], point["dedicated"]["value"]) for point in claims["overtaking"]] == [(16, 100.0)]
    assert "approaches_dedicated" in claims["waiting"]
    alone = joined.model_copy(update={"claims": claims, "recipe": recipe})
    titles = {title for title, _ in page.sections(alone)}
    assert {"Against dedicated tuning", "Where dedicated tuning overtakes"} <= titles
    assert f"{recipe['budget_tokens']:,} tokens a method" not in page.page(alone, "study-dedicated-short", "recipe.yaml")
    other = results.model_copy(update={"recipe": results.recipe | {"num_queries": 7}})
    with pytest.raises(UserInputError, match="the two studies differ in num_queries, "):
        page.join_results(alone, other)
    assert not titles & {"All pairs", "Methods by shots", "Behind the claims", "Equal answers, equal seconds"}


def test_budgets_hold_every_snapshot_that_was_evaluated(page: Any, results: StudyResults) -> None:
    rows = page.budget_lines(results.claims["budget_curves"])[2:]
    curve = results.claims["budget_curves"]["all_answers"]
    assert [row.split(" | ")[1] for row in rows if row.startswith("| all_answers ")] == ["50,000", "100,000", "150,000"]
    shown = f"| {page.points(curve[-1]['at_best_shots'])} | {page.points(curve[-1]['at_max'])} |"
    assert any(row.startswith("| all_answers | 150,000 |") and row.endswith(shown) for row in rows)
    assert rows[-1].startswith("At equal answers ours cannot be compared with few_shot_5: ")
    assert page.budget_lines({}) == ["Not evaluated yet."]
    assert page.budget_lines({"all_answers": curve, "zero_shot": curve})[-1].startswith("| zero_shot |")


def test_math_and_what_ours_forgets_less_stand_apart(page: Any, results: StudyResults) -> None:
    recipe = StudyRecipe(forgetting=ForgettingConfig(corpora=["novels.txt"])).model_dump(mode="json") | results.recipe
    sections = dict(page.sections(results.model_copy(update={"recipe": recipe})))
    math = results.claims["methods"]["all_answers"]["math"]
    row = " | ".join(page.points(math.get(str(count))) for count in results.recipe["shots"])
    assert f"| all_answers | {row} |" in sections["Math, apart"]
    assert page.math_lines({"all_answers": {"math": {}}}, [0]) == ["Not evaluated yet."]
    card = results.claims["claims"]["forgets_less"]
    (first, *_) = card["base_bits_per_byte"]
    change = card["ours_less_other"]["zero_shot"][first]
    assert any(line.startswith(f"| zero_shot | {change['value']:+.4f} ({change['low']:+.4f} ") for line in sections["Forgetting"])
    note = "No task of lm-evaluation-harness was run."
    assert results.harness
    assert note not in sections["Forgetting"]
    assert note in dict(page.sections(results.model_copy(update={"recipe": recipe, "harness": []})))["Forgetting"]


def test_dedicated_models_say_how_often_they_saw_their_examples(page: Any, results: StudyResults) -> None:
    """Of 40 examples 8 are kept back."""
    (full,) = (facts for facts in results.models if facts.method == "dedicated_full")
    models = [full.model_copy(update={"num_examples": 40, "answers": answers}) for answers in (32, 80)]
    recipe = StudyRecipe().model_dump(mode="json")
    lines = page.passes_lines(results.model_copy(update={"models": models, "recipe": recipe}))
    assert lines[1].startswith("At most 200,000 tokens and 10 passes, ")
    shown = f"{full.updates:,} to {full.updates:,} | {full.tokens:,} to {full.tokens:,} | 1.0 to 2.5"
    assert lines[-1] == f"| dedicated_full | 2 | {shown} |"
    assert page.passes_lines(results.model_copy(update={"models": [], "recipe": recipe})) == []


def test_which_rates_dedicated_models_were_tuned_at_and_chose(page: Any, results: StudyResults) -> None:
    (full,) = (facts for facts in results.models if facts.method == "dedicated_full")
    (cell,) = (cell for cell in results.cells if cell.cell == "dedicated/rte/full")
    found = {"a": (2e-3, {"0.0006": 1.0, "0.002": 0.5}), "b": (6e-4, {"0.0006": 0.5, "0.002": 1.0}), "c": (2e-3, {})}
    models = [full.model_copy(update={"model": f"dedicated/{name}", "learning_rate": rate}) for name, (rate, _) in found.items()]
    cells = [
        cell.model_copy(update={"cell": f"dedicated/{name}", "facts": {"kept_back_losses": losses}})
        for name, (_, losses) in found.items()
    ]
    lines = page.rate_lines(results.model_copy(update={"models": models, "cells": cells}))
    shown = "at 0.0006 and 0.002: 0.0006 for 1, 0.002 for 1; at one rate: 0.002 for 1"
    assert lines[-1] == f"- dedicated_full, tuned {shown}"
    assert page.rate_lines(results.model_copy(update={"models": models[2:], "cells": cells[2:]})) == []


def test_seeds_stand_side_by_side(page: Any, results: StudyResults) -> None:
    rows = page.seed_lines(results.claims["training_seeds"])[2:]
    found = results.claims["training_seeds"]["all_answers"]
    zero, most = (", ".join(f"{value:.1f}" for value in found[count].values()) for count in ("0", "max"))
    assert f"| all_answers | {zero} | {most} |" in rows
    assert len(zero.split(", ")) == 2
    assert page.seed_lines({}) == ["Not evaluated yet."]


def test_causes_stand_by_seed_by_budget_and_by_choice(page: Any, results: StudyResults) -> None:
    causes = results.claims["causes"]
    lines = page.cause_lines(causes)
    seeds = causes["by_seed"]["zero_shot"]["max"]
    shown = ", ".join(f"{one['value']:.1f}" for one in seeds["by_seed"].values())
    assert f"| zero_shot | max | {shown} | {page.points(seeds['mean'])} | {seeds['verdict']} |" in lines
    last = causes["by_budget"]["few_shot_5"][-1]
    assert f"| few_shot_5 | 150,000 | {page.points(last['at_best_shots'])} | {page.points(last['at_max'])} |" in lines
    choice = causes["choice"]["zero_shot"]
    assert f"| zero_shot | {choice['chosen']} | {choice['highest']} | {choice['cost']:.1f} |" in lines
    task, one = next(iter(causes["one_label"].items()))
    own = one["methods"]["all_answers"]
    (row,) = [line for line in lines if line.startswith(f"| {task} | ")]
    assert row.split(" | ")[1] == f"{100 * one['right']:.0f}"
    assert f" | {100 * own['at_best_shots']:.0f}, {100 * own['at_max']:.0f} |" in row
    assert page.cause_lines({"one_label": {}, "by_seed": {}, "by_budget": {}, "choice": {}}) == ["Not evaluated yet."]


def test_the_family_left_out_is_named_with_its_verdict(page: Any, results: StudyResults) -> None:
    claim = results.claims["family"]
    lines = page.family_lines(claim)
    assert [line.split(" at max: ")[0] for line in lines[:2]] == [
        f"- Trained without any nli task, ours less {method}" for method in ("few_shot_5", "few_shot_16")
    ]
    assert f" at max: {page.points(claim['at_max'])} ({claim['verdict']}); " in lines[0]
    sixteen = claim["by_method"]["few_shot_16"]
    assert f"rte {page.points(sixteen['by_task']['rte'])}. At the shots chosen in the main setting: " in lines[1]
    assert lines[1].endswith(": -.")  # In this study few_shot_16 has no reading of the main setting to take shots from.
    five = claim["by_method"]["few_shot_5"]
    assert lines[0].endswith(f": {page.points(five['at_best_shots'])}.")
    means = {}
    for name in ("all_answers", "few_shot_5"):
        shots = results.claims["methods"][name]["best_shots"]
        own = [each for each in results.records if each.model == f"{name}/family/seed-0" and each.shots == shots]
        assert {each.task for each in own} == {"rte", "sick"}
        means[name] = 100 * statistics.fmean(each.value for each in own)
    assert five["at_best_shots"]["value"] == pytest.approx(means["all_answers"] - means["few_shot_5"], abs=1e-3)
    assert page.family_lines(None) == ["Not evaluated yet."]


def test_altered_demonstrations_are_shown_when_all_are_there(page: Any, results: StudyResults) -> None:
    settings = {"tasks": ["sick", "trec"], "methods": ["in_context", "all_answers"], "num_shots": 16}
    asked = results.model_copy(update={"recipe": results.recipe | {"robustness": settings}})
    lines = page.robustness_lines(asked)
    assert lines[0] == "Mean over families of sick, trec; 16 demonstrations, under `context` all that fit in so many tokens."
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in lines[4:]}
    own = [record for record in results.records if (record.condition, record.model) == ("flipped:0.5", "all_answers/seed-0")]
    by_task = {task: [Term(1.0, [record for record in own if record.task == task])] for task in ("sick", "trec")}
    assert rows["flipped:0.5"].endswith(f"| {page.points(estimate(by_task).as_json())} |")
    assert list(rows)[-1] == "context:4096"
    for change in ({"tasks": ["sick", "trec", "spam"]}, {"methods": ["in_context", "all_answers", "few_shot_5"]}):
        more = results.model_copy(update={"recipe": results.recipe | {"robustness": settings | change}})
        assert page.robustness_lines(more) == ["Not evaluated for all yet."]


def test_a_second_reading_shows_both_readings_of_the_validation_tasks(page: Any, results: StudyResults) -> None:
    second = {
        "claims": results.claims["claims"],
        "methods": results.claims["methods"],
        "calibrated_validation": {"all_answers": {"0": 1.0, "16": 99.25}},
        "pairs": results.claims["pairs"],
        "one_label": results.claims["causes"]["one_label"],
        "by_seed": {"few_shot_5": results.claims["causes"]["by_seed"]["zero_shot"]},
        "approaches_dedicated": results.claims["claims"]["approaches_dedicated"],
    }
    lines = page.second_reading_lines(results.claims | {"second_reading": second})
    plain = results.claims["methods"]["all_answers"]["validation"]
    best = max(plain, key=lambda count: plain[count])
    assert any(line.startswith(f"| all_answers | {plain[best]:.1f} at {best} | 99.2 at 16 | ") for line in lines)
    assert lines[-len(page.dedicated_lines(second["approaches_dedicated"])) :] == page.dedicated_lines(
        second["approaches_dedicated"]
    )
    own = results.claims["pairs"]["ours_less"]["zero_shot"]
    tuned = results.claims["pairs"]["less_untuned"]["zero_shot"]
    shown = " | ".join(page.points(one[place]) for one in (own, tuned) for place in ("at_best_shots", "at_max"))
    assert f"| zero_shot | {shown} |" in lines
    assert set(page.one_label_lines(second["one_label"])[:-2]) <= set(lines)
    seeds = second["by_seed"]["few_shot_5"]["max"]
    shown = ", ".join(f"{one['value']:.1f}" for one in seeds["by_seed"].values())
    assert f"| few_shot_5 | max | {shown} | {page.points(seeds['mean'])} | {seeds['verdict']} |" in lines
    assert page.second_reading_lines({"second_reading": None}) == ["Not evaluated yet."]
