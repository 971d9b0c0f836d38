"""Claims from made-up records: what is read where, which verdicts follow, and that held-out tasks choose nothing."""

import numpy as np
import pytest

from manyicl.errors import RecordsError
from manyicl.results.calibrated import CALIBRATED
from manyicl.results.claims import make_claims
from manyicl.results.files import CellFacts, CorpusFacts, ModelFacts, StudyResults, read_results, write_results
from manyicl.results.forgetting_card import change_of_bits
from test_results_contrasts import make

SHOTS = [0, 4, "max"]
TASKS = {
    "v1": ("validation", "classification"),
    "h1": ("held_out", "classification"),
    "h2": ("held_out", "nli"),
    "m": ("held_out", "math"),
}


def grid(model, method, right_by_shots, *, tasks=TASKS, seeds=2):
    """Records on every task: so many of ten queries right at each number of shots."""
    return [
        make(
            task,
            family=family,
            role=role,
            model=model,
            method=method,
            shots=shots,
            seed=seed,
            right=range(right_by_shots[role][shots] if isinstance(right_by_shots, dict) and role in right_by_shots else 0),
        )
        for task, (role, family) in tasks.items()
        for shots in SHOTS
        for seed in range(seeds)
    ]


def facts(method, *, model=None, **fields):
    content = {"model": model or f"{method}/seed-0", "method": method, "training_seed": 0, "learning_rate": 1e-3, "updates": 10}
    content |= {"tokens": 1000, "answers": 50, "target_answers": 50, "seconds": 9.0, "peak_memory_bytes": 1, "is_final": True}
    return ModelFacts.model_validate(content | fields)


@pytest.fixture
def results():
    """Ours is best at 4 shots by the validation tasks, though held-out tasks would say max; few-shot tuning at 0."""
    plain = {"validation": {0: 5, 4: 5, "max": 6}, "held_out": {0: 2, 4: 3, "max": 4}}
    ours = {"validation": {0: 5, 4: 9, "max": 8}, "held_out": {0: 4, 4: 8, "max": 9}}
    few = {"validation": {0: 7, 4: 6, "max": 5}, "held_out": {0: 5, 4: 6, "max": 9}}
    worse = {"validation": {0: 6, 4: 6, "max": 5}, "held_out": {0: 9, 4: 9, "max": 9}}
    records = grid("base", "in_context", plain) + grid("all_answers/seed-0", "all_answers", ours)
    records += grid("few_shot_5/seed-0", "few_shot_5", few) + grid("few_shot_16/seed-0", "few_shot_16", worse)
    models = [facts("all_answers"), facts("few_shot_5"), facts("few_shot_16")]
    return StudyResults(recipe={"shots": SHOTS}, records=records, models=models, corpora=[], cells=[])


def test_each_method_is_read_at_the_shots_that_validation_tasks_choose(results):
    claims = make_claims(results)
    assert {name: method["best_shots"] for name, method in claims["methods"].items()} == {
        "in_context": "max",
        "all_answers": 4,
        "few_shot_5": 0,
        "few_shot_16": 0,
    }
    assert claims["few_shot_variant"] == "few_shot_5"  # The other is better on held-out tasks, which choose nothing.
    found = claims["claims"]["beats_few_shot"]
    assert found["against"] == "few_shot_5"
    assert found["best_shots"] == {"all_answers": 4, "few_shot_5": 0}
    assert found["at_best_shots"]["value"] == pytest.approx(30.0)
    assert found["at_max"]["value"] == pytest.approx(0.0)
    assert found["at_best_shots"]["num_tasks"] == 2  # Without math.
    assert set(found["by_task"]) == {"h1", "h2"}
    assert (found["aim"], found["verdict"]) == (5.0, "holds")


def test_what_waits_for_cells_is_named(results):
    claims = make_claims(results)
    assert claims["waiting"] == ["approaches_dedicated", "beats_last_answer", "beats_zero_shot", "forgets_less"]
    partial = results.model_copy(update={"records": [record for record in results.records if record.role == "validation"]})
    assert "beats_few_shot" in make_claims(partial)["waiting"]
    assert make_claims(results.model_copy(update={"records": [], "models": []}))["methods"] == {}


def test_math_is_apart_and_the_worst_order_is_shown(results):
    records = [
        make("h1", model="all_answers/seed-0", method="all_answers", shots=4, seed=1, right=range(2))
        if (record.task, record.model, record.shots, record.seed) == ("h1", "all_answers/seed-0", 4, 1)
        else record
        for record in results.records
    ]
    method = make_claims(results.model_copy(update={"records": records}))["methods"]["all_answers"]
    assert method["held_out"]["4"]["value"] == pytest.approx(((80 + 20) / 2 + 80) / 2)
    assert method["worst_order"] == pytest.approx((20 + 80) / 2)
    assert method["math"]["4"]["num_tasks"] == 1


def test_slopes_are_points_per_doubling(results):
    """4 and 9 demonstrations (max): the slope is the difference over log2(9 / 4)."""
    slopes = make_claims(results)["claims"]["more_shots_help"]
    assert slopes["all_answers"]["value"] == pytest.approx(10 / np.log2(9 / 4), abs=1e-3)
    assert slopes["difference"]["value"] == pytest.approx(0.0, abs=1e-9)
    assert slopes["verdict"] == "not shown"


def test_dedicated_counts_where_it_learns_the_task(results):
    full = [make("h1", method="dedicated_full", model="d/h1", shots=0, right=range(10))]  # 50 points over the majority.
    full += [make("h2", family="nli", method="dedicated_full", model="d/h2", shots=0, right=range(5))]  # None over it.
    prefix = [
        make(task, family=family, method="dedicated_prefix", model=f"d/{task}/{seed}", shots=0, seed=seed, right=range(9))
        for task, family in (("h1", "classification"), ("h2", "nli"))
        for seed in range(2)
    ]
    claim = make_claims(results.model_copy(update={"records": results.records + full + prefix}))["claims"]["approaches_dedicated"]
    assert claim["tasks"] == ["h1"]
    assert claim["not_learnt"] == {"h2": 0.0}
    assert claim["dedicated_full"]["difference"]["value"] == pytest.approx(80 - 100)
    assert claim["dedicated_prefix"]["difference"]["value"] == pytest.approx(80 - 90)
    assert claim["dedicated_full"]["share_of_gain"]["value"] == pytest.approx((80 - 20) / (100 - 20))
    assert claim["dedicated_prefix"]["difference_at_max"]["value"] == pytest.approx(90 - 90)
    assert claim["dedicated_full"]["share_of_gain_at_max"]["value"] == pytest.approx((90 - 20) / (100 - 20))


def test_training_seeds_and_snapshots_are_shown_beside(results):
    second = grid("all_answers/seed-1", "all_answers", {"validation": {0: 5, 4: 5, "max": 5}, "held_out": {0: 1, 4: 1, "max": 7}})
    early = grid(
        "all_answers/seed-0/1of2", "all_answers", {"validation": {0: 0, 4: 0, "max": 0}, "held_out": {0: 1, 4: 6, "max": 5}}
    )
    models = [
        *results.models,
        facts("all_answers", model="all_answers/seed-1", training_seed=1),
        facts("all_answers", model="all_answers/seed-0/1of2", is_final=False, updates=5, tokens=500, seconds=4.0),
    ]
    claims = make_claims(results.model_copy(update={"records": results.records + second + early, "models": models}))
    assert claims["training_seeds"] == {"all_answers": {"0": {"0": 40.0, "1": 10.0}, "max": {"0": 90.0, "1": 70.0}}}
    curve = claims["budget_curves"]["all_answers"]
    assert [(point["updates"], point["seconds"], point["at_best_shots"]["value"]) for point in curve] == [
        (5, 4.0, 60.0),
        (10, 9.0, 80.0),
    ]


def test_the_forgetting_card(results):
    def text(model, method, bits):
        return CorpusFacts(model=model, method=method, corpus="c.txt", num_bytes=100, window_bits=bits)

    corpora = [text("base", "in_context", [50.0, 50.0]), text("all_answers/seed-0", "all_answers", [51.0, 51.0])]
    corpora += [text("few_shot_5/seed-0", "few_shot_5", [54.0, 58.0]), text("few_shot_16/seed-0", "few_shot_16", [49.0, 49.0])]
    card = make_claims(results.model_copy(update={"corpora": corpora}))["claims"]["forgets_less"]
    assert card["base_bits_per_byte"] == {"c.txt": 1.0}
    changes = {entry["method"]: entry["bits_per_byte_change"]["c.txt"]["value"] for entry in card["models"]}
    assert changes == pytest.approx({"all_answers": 0.02, "few_shot_5": 0.12, "few_shot_16": -0.02})
    assert card["ours_less_other"]["few_shot_5"]["c.txt"] == pytest.approx({"value": -0.1, "low": -0.14, "high": -0.06})
    assert card["verdicts"] == {"few_shot_5": "holds", "few_shot_16": "fails"}


def test_bits_are_paired_by_window():
    draw = np.random.default_rng(0)
    bits = draw.uniform(100, 900, 50)
    left = CorpusFacts(model="a", method="a", corpus="c", num_bytes=1000, window_bits=list(bits + 1.0))
    right = CorpusFacts(model="b", method="b", corpus="c", num_bytes=1000, window_bits=list(bits))
    assert change_of_bits(left, right) == pytest.approx({"value": 0.05, "low": 0.05, "high": 0.05})


def test_results_are_read_as_they_were_written(results, tmp_path):
    whole = results.model_copy(update={"claims": make_claims(results)})
    write_results(whole, tmp_path)
    assert read_results(tmp_path) == whole
    first = (tmp_path / "records.jsonl.gz").read_bytes()
    write_results(whole, tmp_path)
    assert (tmp_path / "records.jsonl.gz").read_bytes() == first


def test_a_folder_without_results_and_a_broken_file_are_errors(results, tmp_path):
    with pytest.raises(RecordsError, match=r"holds no study\.yaml"):
        read_results(tmp_path)
    write_results(results, tmp_path)
    (tmp_path / "models.json").write_text('[{"model": 1}]', encoding="utf-8")
    with pytest.raises(RecordsError, match=r"models\.json: is no list of ModelFacts"):
        read_results(tmp_path)


def calibrated(records, right_by_shots):
    """Calibrated records of the label tasks v1 and h1 beside plain ones of a model."""
    own = [record for record in records if record.task in ("v1", "h1")]
    return [
        make(
            record.task,
            family=record.family,
            role=record.role,
            model=record.model,
            method=record.method,
            shots=record.shots,
            seed=record.seed,
            condition=CALIBRATED,
            right=range(right_by_shots[record.role][record.shots]),
        )
        for record in own
    ]


def test_differences_are_paired_by_seed_and_by_snapshot(results):
    """Ours is behind at 0 shots with the first seed and ahead with the second; behind at half of the budget, ahead at its end."""
    added, models = [], list(results.models)
    for method, right, early in (("all_answers", 8, 5), ("few_shot_5", 6, 8)):
        by_role = {"validation": dict.fromkeys(SHOTS, 5), "held_out": dict.fromkeys(SHOTS, right)}
        added += grid(f"{method}/seed-1", method, by_role)
        models.append(facts(method, model=f"{method}/seed-1", training_seed=1))
        by_role = {"validation": dict.fromkeys(SHOTS, 5), "held_out": dict.fromkeys(SHOTS, early)}
        added += grid(f"{method}/seed-0/1of2", method, by_role, seeds=1)  # One order of demonstrations.
        models.append(facts(method, model=f"{method}/seed-0/1of2", is_final=False, updates=5, tokens=500))
    records = [*results.records, *added]
    causes = make_claims(results.model_copy(update={"records": records, "models": models}))["causes"]
    assert set(causes["by_seed"]) == {"few_shot_5"}  # The other variant has one seed.
    at_zero, at_max = causes["by_seed"]["few_shot_5"]["0"], causes["by_seed"]["few_shot_5"]["max"]
    assert {seed: one["value"] for seed, one in at_zero["by_seed"].items()} == {"0": -10.0, "1": 20.0}
    assert (at_zero["mean"]["value"], at_zero["mean"]["low"] < 5.0 < at_zero["mean"]["high"]) == (5.0, True)
    assert {seed: one["value"] for seed, one in at_max["by_seed"].items()} == {"0": 0.0, "1": 20.0}
    assert [one["verdict"] for one in (at_zero, at_max)] == ["not shown", "holds"]
    assert at_max["without_task"] == {"h1": 10.0, "h2": 10.0}
    assert set(causes["by_budget"]) == {"few_shot_5"}
    rows = causes["by_budget"]["few_shot_5"]
    assert [(row["tokens"], row["at_best_shots"]["value"], row["at_max"]["value"]) for row in rows] == [
        (500, -30.0, -30.0),
        (1000, 30.0, 0.0),  # Ours at 4 shots (80), the other at 0 (50); both 90 at max.
    ]


def test_curves_by_budget_are_read_with_the_orders_that_all_snapshots_have(results):
    """The whole budget is worse with its second order, which the earlier snapshot does not have."""
    records = [record for record in results.records if record.model != "all_answers/seed-0"]
    models = list(results.models)
    for model, seeds in (("all_answers/seed-0", (9, 1)), ("all_answers/seed-0/1of2", (9,))):
        for seed, right in enumerate(seeds):
            by_role = {"validation": {0: 5, 4: 9, "max": 8}, "held_out": dict.fromkeys(SHOTS, right)}
            own = grid(model, "all_answers", by_role)
            records += [record for record in own if record.seed == seed]
    records += grid("few_shot_5/seed-0/1of2", "few_shot_5", {"held_out": dict.fromkeys(SHOTS, 5)}, seeds=1)
    for method in ("all_answers", "few_shot_5"):
        models.append(facts(method, model=f"{method}/seed-0/1of2", is_final=False, updates=5, tokens=500))
    claims = make_claims(results.model_copy(update={"records": records, "models": models}))
    rows = claims["causes"]["by_budget"]["few_shot_5"]
    assert [row["at_max"]["value"] for row in rows] == [40.0, 0.0]
    assert claims["claims"]["beats_few_shot"]["at_max"]["value"] == -40.0


def test_a_method_that_gives_one_label_is_seen(results):
    """Right at the even places, which are of label 0: every second query is answered 0, the rest too."""
    records = [record for record in results.records if record.model != "all_answers/seed-0"]
    places = {0: range(0, 10, 2), 4: range(10), "max": (0, 1, 2, 4, 6, 8)}
    for task, (role, family) in TASKS.items():
        for shots, right in places.items():
            records.append(
                make(task, family=family, role=role, model="all_answers/seed-0", method="all_answers", shots=shots, right=right)
            )
    shares = make_claims(results.model_copy(update={"records": records}))["causes"]["one_label"]
    assert set(shares) == {"h1", "h2"}
    assert shares["h1"]["right"] == 0.5
    best = make_claims(results.model_copy(update={"records": records}))["methods"]["all_answers"]["best_shots"]
    assert best == 4
    assert shares["h1"]["methods"]["all_answers"] == {"at_best_shots": 0.5, "at_max": 0.9}


def test_the_choice_of_shots_costs_what_lies_between_it_and_the_best(results):
    choice = make_claims(results)["causes"]["choice"]
    assert choice["all_answers"] == {"chosen": "4", "highest": "max", "cost": 10.0}
    assert choice["few_shot_5"] == {"chosen": "0", "highest": "max", "cost": 40.0}


def test_the_second_reading_calibrates_each_method_where_validation_tasks_want_it(results):
    better = {"validation": {0: 6, 4: 8, "max": 10}, "held_out": {0: 1, 4: 2, "max": 3}}
    worse = {"validation": {0: 6, 4: 5, "max": 5}, "held_out": {0: 10, 4: 10, "max": 10}}
    added = []
    for model, right in (
        ("base", worse),
        ("all_answers/seed-0", better),
        ("few_shot_5/seed-0", worse),
        ("few_shot_16/seed-0", worse),
    ):
        added += calibrated([record for record in results.records if record.model == model], right)
    claims = make_claims(results.model_copy(update={"records": results.records + added}))
    second = claims["second_reading"]
    assert {name: (method["model"], method["best_shots"]) for name, method in second["methods"].items()} == {
        "in_context": ("base", "max"),
        "all_answers": ("all_answers/seed-0+calibrated", "max"),
        "few_shot_5": ("few_shot_5/seed-0", 0),
        "few_shot_16": ("few_shot_16/seed-0", 0),
    }
    assert second["calibrated_validation"]["all_answers"] == {"0": 60.0, "4": 80.0, "max": 100.0}
    found = second["claims"]["beats_few_shot"]
    # h1 is read calibrated, h2 has no calibrated records and is read as it is: (30 + 90) / 2 less (50 + 50) / 2.
    assert found["at_best_shots"]["value"] == pytest.approx((30 + 90) / 2 - 50)
    assert claims["claims"] == make_claims(results)["claims"]  # The first reading stands.
    # Ours has 60, and the others 50, 90 and 40; tuned methods less the last.
    ours_less = {name: one["at_best_shots"]["value"] for name, one in second["pairs"]["ours_less"].items()}
    assert ours_less == {"few_shot_5": 10.0, "few_shot_16": -30.0, "in_context": 20.0}
    less_untuned = {name: one["at_best_shots"]["value"] for name, one in second["pairs"]["less_untuned"].items()}
    assert less_untuned == {"all_answers": 20.0, "few_shot_5": 10.0, "few_shot_16": 50.0}
    assert found["without_task"]["at_best_shots"] == {"h1": 40.0, "h2": -20.0}
    assert second["one_label"]["h1"]["methods"]["all_answers"] == {"at_best_shots": 0.6, "at_max": 0.6}  # Right at 0, 1 and 2.
    assert second["approaches_dedicated"] is None


def test_the_second_reading_has_the_seeds_that_are_read_as_it_reads_each_method(results):
    """Ours is calibrated and the other is not; of h1 alone there are calibrated records."""
    better = {"validation": {0: 6, 4: 8, "max": 10}, "held_out": {0: 1, 4: 2, "max": 3}}
    worse = {"validation": dict.fromkeys(SHOTS, 1), "held_out": dict.fromkeys(SHOTS, 10)}
    by_role = {"held_out": dict.fromkeys(SHOTS, 8)}
    ours, other = (grid(f"{method}/seed-1", method, by_role) for method in ("all_answers", "few_shot_5"))
    models = [*results.models, *(facts(name, model=f"{name}/seed-1", training_seed=1) for name in ("all_answers", "few_shot_5"))]
    added = [*ours, *other, *calibrated(other, worse)]
    for model in ("base", "few_shot_5/seed-0", "few_shot_16/seed-0"):
        added += calibrated([record for record in results.records if record.model == model], worse)
    added += calibrated([record for record in results.records if record.model == "all_answers/seed-0"], better)
    some = results.model_copy(update={"records": results.records + added, "models": models})
    assert make_claims(some)["second_reading"]["by_seed"] == {}  # The second seed of ours is not calibrated yet.
    second = make_claims(some.model_copy(update={"records": some.records + calibrated(ours, better)}))["second_reading"]
    assert set(second["by_seed"]) == {"few_shot_5"}
    at_max = second["by_seed"]["few_shot_5"]["max"]
    # Ours (30 + 90) / 2 and (30 + 80) / 2, the other 90 and 80.
    assert {seed: one["value"] for seed, one in at_max["by_seed"].items()} == {"0": -30.0, "1": -25.0}
    assert at_max["mean"]["value"] == -27.5


def test_the_second_reading_waits_for_all_methods(results):
    assert make_claims(results)["second_reading"] is None
    ours = [record for record in results.records if record.model == "all_answers/seed-0"]
    right = {"validation": dict.fromkeys(SHOTS, 9), "held_out": dict.fromkeys(SHOTS, 9)}
    some = results.model_copy(update={"records": results.records + calibrated(ours, right)})
    assert make_claims(some)["second_reading"] is None


def test_the_second_reading_waits_for_all_its_cells(results):
    """Of some tasks alone it would be a plain reading by another name."""
    right = {"validation": dict.fromkeys(SHOTS, 9), "held_out": dict.fromkeys(SHOTS, 9)}
    read_again = results.model_copy(update={"records": results.records + calibrated(results.records, right)})
    assert make_claims(read_again)["second_reading"] is not None
    for status in ("open", "failed"):
        cell = CellFacts(cell="calibrated/base/h1", kind="calibrated", status=status)
        assert make_claims(read_again.model_copy(update={"cells": [cell]}))["second_reading"] is None
        cell = CellFacts(cell="calibrated/last_answer/seed-0/h1", kind="calibrated", status=status)  # It has no records yet.
        assert make_claims(read_again.model_copy(update={"cells": [cell]}))["second_reading"] is None
        cell = CellFacts(cell="calibrated/all_answers/seed-1/h1", kind="calibrated", status=status)  # It has another table.
        recipe = results.recipe | {"training_seeds": {"values": [1]}}
        assert make_claims(read_again.model_copy(update={"cells": [cell], "recipe": recipe}))["second_reading"] is not None


def test_variants_are_compared_with_what_they_are_variants_of(results):
    better = {"validation": dict.fromkeys(SHOTS, 9), "held_out": dict.fromkeys(SHOTS, 9)}
    records = results.records + grid("short/seed-0", "short", better)
    recipe = results.recipe | {"variants": {"short": {"method": "few_shot_5", "change": {}}, "other": {"method": "all_answers"}}}
    models = [*results.models, facts("short")]
    claims = make_claims(results.model_copy(update={"records": records, "recipe": recipe, "models": models}))
    assert list(claims["variants"]) == ["short"]  # The other is not evaluated.
    assert claims["variants"]["short"]["against"] == "few_shot_5"
    assert claims["variants"]["short"]["at_best_shots"]["value"] == pytest.approx(90 - 50)
