"""The numbers and sentences of a report are those of its claims and records."""

from typing import Any

import numpy as np
import pytest

from manyicl.records import EvaluationRecord
from manyicl.reporting.answers import answer, claims_table, second_reading_table
from manyicl.reporting.effects import harness_table
from manyicl.reporting.findings import Findings
from manyicl.reporting.html import render_report, sections
from manyicl.reporting.tables import show_estimate, show_number
from manyicl.results.calibrated import CALIBRATED
from manyicl.results.claims import make_claims
from manyicl.results.files import StudyResults
from manyicl.results.readings import OURS
from report_fixtures import EVIL, METHODS, SHOTS, TASKS, Page, make_record, model_of, study_results


@pytest.fixture(scope="module")
def results() -> StudyResults:
    return study_results()


@pytest.fixture(scope="module")
def page(results: StudyResults) -> Page:
    return Page(render_report(results, command="manyicl report results"))


def own_records(results: StudyResults, model: str, task: str, shots: object, condition: str = "") -> list[EvaluationRecord]:
    wanted = (model, task, shots, condition)
    return [record for record in results.records if (record.model, record.task, record.shots, record.condition) == wanted]


def test_the_answer_is_that_of_the_claim(results: StudyResults, page: Page) -> None:
    found = results.claims["claims"]["beats_few_shot"]
    size, low, high = (found["at_best_shots"][end] for end in ("value", "low", "high"))
    assert found["verdict"] == "holds"
    assert low > 5
    text = page.words()
    assert (
        f"Yes: trained on every answer, the model scores {size:.1f} points more than after few-shot tuning (5), 95% interval "
        f"+{low:.1f} to +{high:.1f}." in text
    )
    shots = found["best_shots"]
    assert (
        "Mean over families of 5 held-out tasks, points on 0-100, each at its own best number of shots (ours "
        f"{shots['all_answers']} and few-shot tuning (5) {shots['few_shot_5']}). The aim of +5 points is reached, over the whole "
        "interval." in text
    )
    slope = results.claims["claims"]["more_shots_help"]
    assert f"Each doubling of demonstrations changes ours by +{slope['all_answers']['value']:.1f} (" in text
    assert "36 of 38 cells are done, 1 failed. What is open: 1 cell; what follows is known so far." in text
    assert "Claims that wait for cells: beats many-shot tuning on the last answer." in text


def few_shot_claim(value: float, low: float, high: float, verdict: str, aim: float | None = 5.0) -> dict[str, Any]:
    found = {"value": value, "low": low, "high": high, "num_tasks": 1}
    return {
        "against": "few_shot_16",
        "at_best_shots": found,
        "at_max": found,
        "best_shots": {"all_answers": 64, "few_shot_16": 16},
        "by_task": {},
        "aim": aim,
        "verdict": verdict,
    }


@pytest.mark.parametrize(
    ("claim", "lead", "aim"),
    [
        (
            few_shot_claim(6.04, 5.2, 7.0, "holds"),
            "Yes: trained on every answer, the model scores 6.0 points more than after few-shot tuning (16), "
            "95% interval +5.2 to +7.0.",
            "The aim of +5 points is reached, over the whole interval.",
        ),
        (
            few_shot_claim(6.0, 1.0, 9.0, "holds"),
            "Yes: trained on every answer, the model scores 6.0 points more than after few-shot tuning (16), "
            "95% interval +1.0 to +9.0.",
            "The aim of +5 points is reached, though part of the interval lies below it.",
        ),
        (
            few_shot_claim(-2.0, -4.0, -0.5, "fails"),
            "No: trained on every answer, the model scores 2.0 points less than after few-shot tuning (16), "
            "95% interval −4.0 to −0.5.",
            "The aim of +5 points is missed.",
        ),
        (
            few_shot_claim(1.0, -4.0, 6.5, "not shown"),
            "Not shown: trained on every answer, the model differs by +1.0 points from few-shot tuning (16), "
            "95% interval −4.0 to +6.5.",
            "The aim of +5 points is not reached, though the interval does not exclude it.",
        ),
    ],
)
def test_the_answer_follows_the_verdict(claim: dict[str, Any], lead: str, aim: str) -> None:
    claims = {"claims": {"beats_few_shot": claim}, "waiting": []}
    found = answer(Findings(StudyResults(recipe={}, records=[], models=[], corpora=[], cells=[], claims=claims)))
    assert found.lead == lead
    assert found.basis == (
        "Mean over families of 1 held-out task, points on 0-100, each at its own best number of shots (ours 64 and few-shot "
        f"tuning (16) 16). {aim}"
    )
    assert (found.points, found.status) == ([], "")


def test_the_claims_table_holds_every_claim(results: StudyResults, page: Page) -> None:
    claims = results.claims["claims"]
    table = {row[0]: row for row in claims_table(Findings(results)).rows}

    def numbers(found: dict[str, float], factor: float = 1.0) -> tuple[float, ...]:
        return tuple(round(found[end] * factor, 4) for end in ("value", "low", "high"))

    zero = claims["beats_zero_shot"]
    row = ("beats zero-shot tuning", zero["verdict"], *numbers(zero["at_best_shots"]), "points", zero["at_max"]["value"], 8.0)
    assert table["beats zero-shot tuning"] == row
    assert table["beats many-shot tuning on the last answer"][1:3] == ("open", None)
    full = claims["approaches_dedicated"]["dedicated_full"]
    verdict = {"holds": "ahead", "fails": "behind", "not shown": "no difference shown"}[full["verdict"]]
    assert table["approaches dedicated tuning, whole train split"][1:5] == (verdict, *numbers(full["difference"]))
    share = table["share of the gain of dedicated tuning, whole train split"]
    assert share[2:6] == (*numbers(full["share_of_gain"], 100), "% of its gain")
    own_row = table["approaches dedicated tuning, whole train split"]
    assert (own_row[6], share[6]) == (full["difference_at_max"]["value"], numbers(full["share_of_gain_at_max"], 100)[0])
    forgets = claims["forgets_less"]
    lost = forgets["ours_less_other"]["few_shot_5"]["novels.txt"]
    row = table["forgets less than few-shot tuning (5), novels.txt"]
    assert row[1:5] == (forgets["verdicts"]["few_shot_5"], *numbers(lost, 1000))
    family = results.claims["family"]
    row = table["beats few-shot tuning (5) on a family left out (nli)"]
    assert row[1:5] == (family["verdict"], *numbers(family["at_max"]))
    assert [row[0] for row in page.csv("claims")[1:]] == list(table)


def test_the_claims_table_holds_the_variants_of_an_ablation() -> None:
    claim = few_shot_claim(1.5, -3.5, 7.6, "not shown") | {"against": "all_answers", "aim": None}
    claim |= {"at_max": {"value": 5.5, "low": 1.4, "high": 10.0, "num_tasks": 2}}
    claims = {"claims": {}, "waiting": [], "variants": {"remapped_half": claim}}
    found = Findings(StudyResults(recipe={}, records=[], models=[], corpora=[], cells=[], claims=claims))
    row = ("remapped half beats many-shot, all answers (ours)", "not shown", 1.5, -3.5, 7.6, "points", 5.5, None)
    assert claims_table(found).rows[-1] == row


def test_the_curves_are_those_of_the_claims_and_records(results: StudyResults, page: Page) -> None:
    rows = {(row[1], row[2]): row[3:] for row in page.csv("shot-curves")[1:]}
    labels = {"in_context": "no tuning", "all_answers": "many-shot, all answers (ours)", "zero_shot": "zero-shot tuning"}
    for method, label in labels.items():
        for shots in SHOTS:
            found = results.claims["methods"][method]["held_out"][str(shots)]
            assert [float(value) for value in rows[label, str(shots)][:3]] == [found["value"], found["low"], found["high"]]
    # The worst order is the lowest of the means over families: classification and nli hold two tasks each, qa one.
    families = [("spam", "trec"), ("rte", "sick"), (EVIL,)]
    by_order = [
        np.mean([np.mean([own_records(results, "base", task, 4)[order].value for task in tasks]) for tasks in families])
        for order in range(3)
    ]
    assert float(rows["no tuning", "4"][3]) == pytest.approx(100 * min(by_order), abs=1e-3)
    assert ("TF-IDF, no language model", "0") not in rows
    family = {(row[0], row[1], row[2]): row[3] for row in page.csv("family-curves")[1:]}
    mean = np.mean([record.value for record in own_records(results, "all_answers/seed-0", "svamp", 16)])
    assert float(family["math", labels["all_answers"], "16"]) == pytest.approx(100 * mean, abs=1e-3)


def test_the_best_of_each_task_is_marked(results: StudyResults, page: Page) -> None:
    header, *rows = page.csv("tasks")
    best = results.claims["methods"]["zero_shot"]["best_shots"]
    assert best == 0
    assert header[:5] == ["task", "family", "metric", "many-shot, all answers (ours) @ max", "no tuning @ max"]
    assert f"zero-shot tuning @ {best}" in header
    assert [row[0] for row in rows] == ["spam", "trec", "rte", "sick", EVIL, "svamp"]
    values = {row[0]: row[header.index(f"zero-shot tuning @ {best}")] for row in rows}
    for task, value in values.items():
        mean = np.mean([record.value for record in own_records(results, "zero_shot/seed-0", task, best)])
        assert float(value) == pytest.approx(100 * mean, abs=1e-3)
    marked = [number for row in rows for number in row[3:] if float(number) == max(map(float, row[3:]))]
    assert page.best == marked


def test_tasks_of_the_harness_stand_beside_the_untuned_model(results: StudyResults) -> None:
    figure = harness_table(Findings(results))
    assert figure is not None
    assert [row[:2] + row[3:5] for row in figure.table.rows] == [("piqa", "acc", value, 0.02) for value in (0.5, 0.45, 0.3)]
    assert [row[5] for row in figure.table.rows] == [None, pytest.approx(-0.05), pytest.approx(-0.2)]
    assert harness_table(Findings(results.model_copy(update={"harness": []}))) is None


def test_forgetting_is_drawn_against_the_gain(results: StudyResults, page: Page) -> None:
    header, *rows = page.csv("forgetting-gain")
    assert header[4:6] == ["bits per byte, novels.txt", "bits per byte, wikipedia.txt"]
    assert [(row[0], row[1]) for row in rows if row[0] == "few-shot tuning (5)"] == [
        ("few-shot tuning (5)", "25"),
        ("few-shot tuning (5)", "50"),
        ("few-shot tuning (5)", "75"),
    ]
    assert len(rows) == 9
    base = results.claims["methods"]["in_context"]
    start = base["held_out"][str(base["best_shots"])]["value"]
    end = results.claims["budget_curves"]["few_shot_5"][-1]["at_best_shots"]["value"]
    last = next(row for row in rows if row[:2] == ["few-shot tuning (5)", "75"])
    assert float(last[6]) == pytest.approx(end - start, abs=1e-3)
    entry = next(one for one in results.claims["claims"]["forgets_less"]["models"] if one["model"] == "few_shot_5/seed-0")
    assert float(last[4]) == entry["bits_per_byte_change"]["novels.txt"]["value"]


def test_robustness_is_that_of_the_records(results: StudyResults, page: Page) -> None:
    rows = page.csv("robustness")[1:]
    conditions = [f"{row[0]}:{row[1]}" for row in rows if row[2] == "no tuning"]
    assert conditions == [
        "order:shuffled",
        "order:grouped",
        "order:reversed",
        "flipped:0.1",
        "flipped:0.5",
        "symbols:",
        "nearest:",
        "context:2048",
        "context:4096",
    ]
    found = {(f"{row[0]}:{row[1]}", row[2]): float(row[3]) for row in rows}
    means = {}
    for condition in ("order:shuffled", "flipped:0.5"):
        by_task = [
            np.mean([record.value for record in own_records(results, "all_answers/seed-0", task, 16, condition)])
            for task in ("sick", "trec")
        ]
        means[condition] = 100 * np.mean(by_task)
        assert found[condition, "many-shot, all answers (ours)"] == pytest.approx(means[condition], abs=1e-3)
    change = show_number(means["flipped:0.5"] - means["order:shuffled"], is_signed=True)
    assert f"ours {change} points." in page.words()


def test_altered_demonstrations_are_compared_on_the_same_tasks(results: StudyResults) -> None:
    late = [record for record in results.records if (record.model, record.task, record.condition) != ("base", "trec", "symbols")]
    page = Page(render_report(results.model_copy(update={"records": late})))
    assert {row[6] for row in page.csv("robustness")[1:]} == {"1"}
    assert "Mean over sick. With 50% of the answers replaced" in page.words()
    value = np.mean([record.value for record in own_records(results, "base", "sick", 16, "symbols")])
    shown = next(row for row in page.csv("robustness")[1:] if (row[0], row[2]) == ("symbols", "no tuning"))
    assert float(shown[3]) == pytest.approx(100 * value, abs=1e-3)
    none = [record for record in late if (record.model, record.task, record.condition) != ("base", "sick", "nearest")]
    none = [
        record for record in none if (record.model, record.task, record.condition) != ("all_answers/seed-0", "sick", "symbols")
    ]
    assert (
        "Open: no altered demonstrations are evaluated for all methods on a task."
        in Page(render_report(results.model_copy(update={"records": none}))).words()
    )


def test_costs_and_failures_are_those_of_the_files(page: Page) -> None:
    costs = {(row[0], row[1], row[3]): row for row in page.csv("training-costs")[1:]}
    ours = costs["many-shot, all answers (ours)", "held_out", "0"]
    assert ours[4:] == ["75", "150000", "1600", "1500", "200.0", "1.5", "0.0006"]
    assert costs["dedicated, whole train split", "one a task", ""][2] == "1"
    assert len(costs) == 9
    work = {row[0]: row[1:] for row in page.csv("work")[1:]}
    assert work["robustness"][:3] == ["0", "1", "0"]
    assert float(work["train"][3]) == pytest.approx(4 * 260 / 3600)
    assert work["train"][5] == "1.5"
    assert page.csv("failures")[1:] == [["robustness/base/rte", "<b>out of memory</b>"]]


def test_overtaking_seeds_and_family_are_those_of_the_claims(results: StudyResults, page: Page) -> None:
    points = results.claims["overtaking"]
    assert [(row[0], row[1], float(row[2]), row[5], float(row[6])) for row in page.csv("overtaking")[1:]] == [
        (
            point["task"],
            str(point["examples"]),
            point["ours"]["value"],
            str(point["our_demonstrations"]),
            point["dedicated"]["value"],
        )
        for point in points
    ]
    assert "Where the dedicated model is ahead first: sick: at 16." in page.words()
    seeds = {(row[0], row[1], row[2]): float(row[3]) for row in page.csv("training-seeds")[1:]}
    assert seeds["zero-shot tuning", "max", "1"] == results.claims["training_seeds"]["zero_shot"]["max"]["1"]
    left_out = {(row[0], row[1]): float(row[2]) for row in page.csv("left-out-family")[1:]}
    by_method = results.claims["family"]["by_method"]
    assert left_out["few-shot tuning (5)", "mean"] == results.claims["family"]["at_max"]["value"]
    assert left_out["few-shot tuning (16)", "rte"] == by_method["few_shot_16"]["by_task"]["rte"]["value"]


def test_what_stands_behind_the_claims_is_that_of_the_claims(results: StudyResults) -> None:
    page, causes = Page(render_report(results)), results.claims["causes"]
    seeds = causes["by_seed"]["zero_shot"]["max"]
    rows = [row for row in page.csv("causes-seeds")[1:] if row[:2] == ["zero-shot tuning", "max"]]
    assert [(row[2], float(row[3])) for row in rows] == [
        *((seed, one["value"]) for seed, one in seeds["by_seed"].items()),
        ("mean", seeds["mean"]["value"]),
    ]
    assert rows[-1][-1] == seeds["verdict"]
    budgets = [row for row in page.csv("causes-budget")[1:] if row[0] == "few-shot tuning (5)" and row[2] == "max"]
    assert [(int(row[1]), float(row[3])) for row in budgets] == [
        (row["tokens"], row["at_max"]["value"]) for row in causes["by_budget"]["few_shot_5"]
    ]
    shares = {(row[0], row[1]): [float(value) for value in row[2:]] for row in page.csv("causes-labels")[1:]}
    for task, one in causes["one_label"].items():
        own = one["methods"]["zero_shot"]
        expected = [100 * value for value in (own["at_best_shots"], own["at_max"], one["right"])]
        assert shares[task, "zero-shot tuning"] == pytest.approx(expected)
    assert {row[0]: float(row[3]) for row in page.csv("causes-choice")[1:]}["zero-shot tuning"] == causes["choice"]["zero_shot"][
        "cost"
    ]


def test_claims_of_an_earlier_version_have_nothing_behind_them(results: StudyResults) -> None:
    claims = {name: claim for name, claim in results.claims.items() if name != "causes"}
    keys = [section.key for section in sections(Findings(results.model_copy(update={"claims": claims})))]
    assert "causes" not in keys
    assert "seeds" in keys


def test_claims_are_read_as_they_were_written(results: StudyResults) -> None:
    claims = results.claims | {"few_shot_variant": "few_shot_5", "claims": {"beats_few_shot": few_shot_claim(6, 5, 7, "holds")}}
    assert "the model scores 6.0 points more" in Page(render_report(results.model_copy(update={"claims": claims}))).words()
    made = render_report(results.model_copy(update={"claims": {}}))
    assert made == render_report(results)


def test_a_gain_that_may_be_none_has_no_share(results: StudyResults) -> None:
    claims = results.claims["claims"]
    nothing = {"value": None, "low": float("nan"), "high": None, "num_tasks": 5}
    full = claims["approaches_dedicated"]["dedicated_full"] | {"share_of_gain": nothing}
    dedicated = claims["approaches_dedicated"] | {"dedicated_full": full}
    changed = results.claims | {"claims": claims | {"approaches_dedicated": dedicated}}
    found = Findings(results.model_copy(update={"claims": changed}))
    table = {row[0]: row for row in claims_table(found).rows}
    assert table["share of the gain of dedicated tuning, whole train split"][2:5] == (None, None, None)
    own = show_estimate(full["difference"])
    at_max = f"{show_estimate(full['difference_at_max'])} points, {100 * full['share_of_gain_at_max']['value']:.0f}% of its gain"
    assert f"; whole train split {own} points and at max {at_max}." in " ".join(answer(found).points)


def test_dedicated_tuning_that_learns_nothing_is_said(results: StudyResults) -> None:
    nothing = {"tasks": [], "not_learnt": {"sick": 1.25}, "best_shots": 16}
    changed = results.claims | {"claims": results.claims["claims"] | {"approaches_dedicated": nothing}}
    text = Page(render_report(results.model_copy(update={"claims": changed}))).words()
    assert "Dedicated tuning, one model a task, learns none of the held-out tasks." in text


def test_tasks_that_dedicated_tuning_does_not_learn_are_listed(results: StudyResults) -> None:
    claim = results.claims["claims"]["approaches_dedicated"] | {"not_learnt": {"rte": -2.0, "spam": 4.96}}
    changed = results.claims | {"claims": results.claims["claims"] | {"approaches_dedicated": claim}}
    text = Page(render_report(results.model_copy(update={"claims": changed}))).words()
    assert "is less than 5 points above the commonest label: rte (−2.0) and spam (+5.0)." in text


def test_the_second_reading_says_how_each_was_read(results: StudyResults) -> None:
    """Calibration helps ours and nothing else; label tasks alone have calibrated records."""
    tasks = [task for task, facts in TASKS.items() if facts[3]]
    good = dict.fromkeys(METHODS, 0.1) | {OURS: 0.99}
    added = [
        make_record(model_of(method), method, task, shots, seed=seed, chance=good[method], condition=CALIBRATED)
        for method in METHODS
        for task in tasks
        for shots in SHOTS
        for seed in range(3)
    ]
    assert second_reading_table(Findings(results)) is None
    read_again = results.model_copy(update={"records": [*results.records, *added]})
    claims = make_claims(read_again)
    table = second_reading_table(Findings(read_again.model_copy(update={"claims": claims})))
    assert table is not None
    by_other = {row[0]: row for row in table.rows}
    second, first = claims["second_reading"]["claims"]["beats_few_shot"], claims["claims"]["beats_few_shot"]
    found = second["at_best_shots"]
    ours, other = second["best_shots"][OURS], second["best_shots"]["few_shot_5"]
    assert by_other["few-shot tuning (5)"] == (
        "few-shot tuning (5)",
        f"calibrated, {ours} shots",
        f"plain, {other} shots",
        *(round(found[end], 4) for end in ("value", "low", "high")),
        first["at_best_shots"]["value"],
        second["verdict"],
    )
    page = Page(render_report(read_again.model_copy(update={"claims": claims})))
    assert len(page.csv("second-reading")) == 1 + len(by_other)
    assert "second-reading-seeds" not in page.tables  # No second seed is calibrated.
    seeds = claims["causes"]["by_seed"]
    claims["second_reading"]["by_seed"] = {"few_shot_5": seeds["zero_shot"]}
    page = Page(render_report(read_again.model_copy(update={"claims": claims})))
    rows = page.csv("second-reading-seeds")[1:]
    assert {row[0] for row in rows} == {"few-shot tuning (5)"}
    assert [float(row[3]) for row in rows if row[1:3] == ["max", "mean"]] == [seeds["zero_shot"]["max"]["mean"]["value"]]
    waiting = results.model_copy(update={"recipe": results.recipe | {"calibrated": True}})
    (section,) = (section for section in sections(Findings(waiting)) if section.key == "second-reading")
    assert section.open == "label tasks are not evaluated with calibrated scores for all methods."
