"""The published study and what is told of it are what its records say: no number was typed by hand."""

import re
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml

from manyicl.records import read_records
from manyicl.reporting.html import write_report
from manyicl.results.files import read_results
from result_fixtures import RESULTS, ROOT, load_benchmark, load_claims


def shown(one: dict[str, float], words: str = "", sign: int = 1) -> str:
    """A value in points, words and its interval; turned about where `sign` is -1."""
    low, high = sorted((sign * one["low"], sign * one["high"]))
    return f"{sign * one['value']:.1f}{words} ({low:.1f} to {high:.1f})"


def flat_page(name: str) -> str:
    """A page in one line."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


CLAIMS = {
    "beats_few_shot": "few-shot tuning",
    "beats_zero_shot": "zero-shot tuning",
    "beats_last_answer": "many-shot tuning on the last answer",
    "beats_base": "no tuning",
}


def test_the_readme_shows_the_claims_of_the_study() -> None:
    found = load_claims("study")
    second, first = found["second_reading"], load_claims("study-first")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, words in CLAIMS.items():
        values = [reading["claims"][name][place] for reading in (found, second) for place in ("at_best_shots", "at_max")]
        assert f"| {words} | {' | '.join(map(shown, values))} |" in readme
    verdicts = {name: found["claims"][name]["verdict"] for name in CLAIMS}
    assert verdicts == dict.fromkeys(CLAIMS, "not shown") | {"beats_base": "holds"}
    assert {second["claims"][name]["verdict"] for name in CLAIMS} == {"not shown"}
    assert [name for name in CLAIMS if first["claims"][name]["verdict"] != "holds"] == ["beats_few_shot"]
    untuned = [claims["methods"]["in_context"]["held_out"] for claims in (found, first)]
    assert all(abs(untuned[0][shots]["value"] - untuned[1][shots]["value"]) < 0.5 for shots in untuned[0])
    assert [reading["claims"]["beats_few_shot"]["against"] for reading in (found, second)] == ["few_shot_5", "few_shot_16"]
    assert found["claims"]["more_shots_help"]["verdict"] == "not shown"
    recipe = yaml.safe_load((RESULTS / "study" / "study.yaml").read_text(encoding="utf-8"))
    assert f"{recipe['budget_tokens']:,} tokens each" in readme
    assert f"all that fit in {recipe['context_tokens']:,} tokens" in readme


def test_the_readme_words_are_those_of_the_study() -> None:
    found = load_claims("study")
    second = found["second_reading"]
    five, reweighted = (second["pairs"]["ours_less"][name]["at_best_shots"] for name in ("few_shot_5", "reweighted"))
    untuned = [reading["methods"]["in_context"] for reading in (found, second)]
    plain, calibrated = (method["held_out"][str(method["best_shots"])]["value"] for method in untuned)
    at_max = untuned[0]["held_out"]["max"]["value"]
    ours = [reading["methods"]["all_answers"]["held_out"]["max"]["value"] for reading in (found, second)]
    classic = [reading["pairs"]["ours_less"]["classic"]["at_max"] for reading in (found, second)]
    by_seed = found["causes"]["by_seed"]
    assert classic[1]["low"] < 0 < classic[1]["high"]
    expected = [
        f"on 5 demonstrations (by {by_seed['few_shot_5']['max']['mean']['value']:.1f}) and of zero-shot tuning (by "
        f"{by_seed['zero_shot']['max']['mean']['value']:.1f})",
        f"takes the untuned model to {calibrated:.1f} where ours has {ours[1]:.1f}",
        f"by {-second['claims']['beats_few_shot']['at_max']['value']:.1f} points at max, on 5 by {shown(five, sign=-1)}",
        f"lifts the untuned model from {plain:.1f} to {calibrated:.1f}",
        f"{at_max - plain:.1f} points are of more shots: calibrated it is read at {untuned[1]['best_shots']}, before at "
        f"{untuned[0]['best_shots']}, and not calibrated it has {at_max:.1f} at max",
        f"in the second reading, by {shown(reweighted, sign=-1)}",
        f"is not shown either: {shown(found['claims']['more_shots_help']['all_answers'], ' points a doubling')}",
        f"{found['methods']['classic']['held_out']['max']['value']:.1f} with the whole train split. Ours, with what fits, scores "
        f"{ours[0]:.1f} at max, which is {shown(classic[0], ' less', sign=-1)}, and {ours[1]:.1f} calibrated, "
        f"{-classic[1]['value']:.1f} less, not shown",
    ]
    assert [words for words in expected if words not in flat_page("README.md")] == []


def test_the_scores_of_dedicated_rates_are_those_of_their_cells() -> None:
    results = read_results(RESULTS / "study")
    scores: dict[str, list[float]] = {}
    for cell in results.cells:
        if cell.kind == "dedicated-rate":
            scores.setdefault(cell.cell.rpartition("/")[2], []).append(100 * cell.facts["score"])
    means = {rate: f"{fmean(own):.1f}" for rate, own in scores.items()}
    (note,) = (note for note in results.recipe["notes"] if note.startswith("Dedicated models are tuned at the two rates"))
    assert f"2e-4, 6e-4 and 2e-3 had {means['0.0002']}, {means['0.0006']} and {means['0.002']} on" in note
    assert f"on a processor with AMX, {means['0.006']}." in note
    assert sorted(means, key=lambda rate: -float(means[rate]))[:2] == ["0.002", "0.0006"]


def test_what_better_tuning_did_to_dedicated_models_is_told() -> None:
    """Means over orders of those tuned on our demonstrations, as first run and as they are."""
    means: dict[str, dict[str, list[float]]] = {}
    for name in ("study-dedicated-short", "study"):
        for record in read_records(RESULTS / name / "records.jsonl.gz"):
            if record.method == "dedicated_prefix":
                means.setdefault(record.task, {}).setdefault(name, []).append(100 * record.value)
    spans = {task: [f"{fmean(values):.1f}" for values in own.values()] for task, own in means.items()}
    why = flat_page("docs/results/why.md")
    gained = [f"on {task} from {' to '.join(spans[task])}" for task in ("sms_spam", "sick", "trec_question_type")]
    assert f"go {', '.join(gained)}, on scitldr_abstract from {' down to '.join(spans['scitldr_abstract'])}." in why
    for name in ("study-dedicated-short", "study"):
        claim = load_claims(name)["claims"]["approaches_dedicated"]
        told = [shown(claim[method]["difference_at_max"]) for method in ("dedicated_prefix", "dedicated_full")]
        assert [words for words in told if words not in why] == []
    found = load_claims("study")["second_reading"]["approaches_dedicated"]
    prefix, full = found["dedicated_prefix"], found["dedicated_full"]
    assert (
        f"same demonstrations is {shown(prefix['difference'])}, {100 * prefix['share_of_gain']['value']:.0f}% of its gain over "
        f"the untuned model at 0 shots, and on the whole train split {shown(full['difference'])}, "
        f"{100 * full['share_of_gain']['value']:.0f}% of it."
    ) in why


def test_which_dedicated_models_were_tuned_at_two_rates_is_told() -> None:
    results = read_results(RESULTS / "study")
    tried = {cell.cell: len(cell.facts.get("kept_back_losses", {})) for cell in results.cells if cell.kind == "dedicated"}
    assert {name.rpartition("/")[2].partition("-")[0] for name, count in tried.items() if count == 0} == {"full", "256"}
    assert {count for name, count in tried.items() if not name.endswith("/full") and "/256-" not in name} == {2}
    (note,) = (note for note in results.recipe["notes"] if note.startswith("Two rates were decided on after"))
    assert "Models on the whole train split and on 256 examples were not tuned again, and are those of 2e-3." in note


def test_the_readme_shows_how_near_dedicated_models_are() -> None:
    found = load_claims("study")
    readme = flat_page("README.md")
    first, second = (reading["approaches_dedicated"] for reading in (found["claims"], found["second_reading"]))
    for name, words in (
        ("dedicated_prefix", "one dedicated model a task, tuned on the same demonstrations as ours at max"),
        ("dedicated_full", "one dedicated model a task, tuned on the whole train split"),
    ):
        values = [reading[name][f"difference{place}"] for reading in (first, second) for place in ("", "_at_max")]
        assert f"| {words} | {' | '.join(map(shown, values))} |" in readme
        assert all(one["high"] < 0 for one in values)
    shares = [first["dedicated_prefix"]["share_of_gain_at_max"], second["dedicated_prefix"]["share_of_gain"]]
    percent = [[f"{100 * share[end]:.0f}%" for end in ("value", "low", "high")] for share in shares]
    short = load_claims("study-dedicated-short")["claims"]["approaches_dedicated"]["dedicated_prefix"]["difference_at_max"]
    behind = [-first[name]["difference_at_max"]["value"] for name in ("dedicated_prefix", "dedicated_full")]
    expected = [
        f"At max ours has {percent[0][0]} of their gain over the untuned model at 0 shots ({percent[0][1]} to {percent[0][2]}), "
        f"{percent[1][0]} with our scores calibrated and theirs not ({percent[1][1]} to {percent[1][2]}).",
        f"stopped at 60,000 tokens or five passes, {shown(short, sign=-1)}.",
        f"by {behind[0]:.1f} if tuned on the same demonstrations, by {behind[1]:.1f} on the whole train split.",
    ]
    assert [words for words in expected if words not in readme] == []


def test_the_readme_shows_the_training_seeds_of_the_study() -> None:
    claims = load_claims("study")
    found, again = claims["causes"]["by_seed"], claims["second_reading"]["by_seed"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {"few_shot_5": "few-shot tuning on 5", "few_shot_16": "few-shot tuning on 16", "zero_shot": "zero-shot tuning"}
    for name, words in names.items():
        shown = []
        for by_seed in (found, again):
            seeds, mean = by_seed[name]["max"]["by_seed"], by_seed[name]["max"]["mean"]
            shown.append(", ".join(f"{seeds[seed]['value']:.1f}" for seed in ("0", "1", "2")))
            shown.append(f"{mean['value']:.1f} ({mean['low']:.1f} to {mean['high']:.1f})")
        assert f"| {words} | {' | '.join(shown)} |" in readme
    assert {name: found[name]["max"]["verdict"] for name in names} == dict.fromkeys(names, "holds") | {"few_shot_16": "not shown"}
    assert {name: again[name]["max"]["verdict"] for name in names} == dict.fromkeys(names, "holds") | {"zero_shot": "not shown"}
    assert {by_seed[name]["0"]["verdict"] for name in names for by_seed in (found, again)} == {"not shown"}
    assert len(found) == len(again) == len(names)
    five, zero = found["few_shot_5"]["max"], found["zero_shot"]["max"]
    assert (
        f"the {five['mean']['value']:.1f} and {zero['mean']['value']:.1f} are {five['without_task']['sms_spam']:.1f} and "
        f"{zero['without_task']['sms_spam']:.1f};"
    ) in " ".join(readme.split())
    few = [again[name]["max"] for name in ("few_shot_5", "few_shot_16")]
    spans = [max(values) - min(values) for values in ([one["value"] for one in own["by_seed"].values()] for own in few)]
    assert f"they lie {spans[0]:.1f} and {spans[1]:.1f} points apart against few-shot tuning" in " ".join(readme.split())
    means, without = (
        [f"{value:.1f}" for value in values]
        for values in zip(*((one["mean"]["value"], one["without_task"]["sick"]) for one in few), strict=True)
    )
    assert f"the {' and '.join(means)} are {' and '.join(without)}." in " ".join(readme.split())


def test_the_readme_shows_what_is_forgotten() -> None:
    card = load_claims("study")["claims"]["forgets_less"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    zero, few = (list(card["ours_less_other"][name].values()) for name in ("zero_shot", "few_shot_5"))
    base = " and ".join(f"{bits:.2f}" for bits in card["base_bits_per_byte"].values())
    less = " and ".join(f"{-one['value']:.3f}" for one in zero)
    assert f"ours loses {less} bits per byte less than zero-shot tuning on two plain texts, of {base}." in readme
    shown = " and ".join(f"{one['value']:.4f} ({one['low']:.4f} to {one['high']:.4f})" for one in few)
    assert f"than few-shot tuning on 5 is not shown: {shown}." in readme
    more, fewer = (one["value"] for one in card["ours_less_other"]["last_answer"].values())
    assert f"the last answer the two texts disagree: {more:.4f} more and {-fewer:.4f} less." in readme
    assert (card["verdicts"]["zero_shot"], card["verdicts"]["few_shot_5"]) == ("holds", "not shown")


def test_the_page_of_reasons_shows_budgets_and_ablations() -> None:
    page = flat_page("docs/results/why.md")
    found = load_claims("study")
    rows = found["causes"]["by_budget"]["few_shot_5"]
    curve = found["budget_curves"]["all_answers"]
    best, most, own = (
        ", ".join(f"{value:.1f}" for value in values[:-1]) + f" and {values[-1]:.1f}"
        for values in (
            [row["at_best_shots"]["value"] for row in rows],
            [row["at_max"]["value"] for row in rows],
            [point["at_max"]["value"] for point in curve],
        )
    )
    assert f"ours less `few_shot_5` is {best} at best shots and {most} at max. Ours itself is {own} at max." in page
    for name, variant, words in (
        ("normalisation", "per_answer", "the loss per answer is {} ahead of ours at max"),
        ("remapping", "remapped_half", "remapping half of the episodes {}."),
    ):
        claim = load_claims(f"ablation-{name}")["variants"][variant]
        one = claim["at_max"]
        assert words.format(f"{one['value']:.1f} ({one['low']:.1f} to {one['high']:.1f})") in page
        assert claim["verdict"] == "not shown"


def test_the_readme_shows_where_dedicated_tuning_overtakes() -> None:
    points = load_claims("study")["overtaking"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    by_count: dict[Any, list[Any]] = {}
    for point in points:
        by_count.setdefault(point["examples"], []).append(point)
    held = [point["our_demonstrations"] for point in by_count[256]]
    assert held == [point["our_demonstrations"] for point in by_count["all"]]
    names = {
        16: "16",
        64: "64",
        256: f"256 ({held[0]}, {held[1]} and {held[2]} of them fit)",
        "all": "whole train split (the same fit)",
    }
    assert list(by_count) == list(names)
    for count, words in names.items():
        assert [point["task"] for point in by_count[count]] == ["snips_intent", "trec_question_type", "tweet_emotion"]
        ours, dedicated = (
            ", ".join(f"{point[name]['value']:.1f}" for point in by_count[count]) for name in ("ours", "dedicated")
        )
        assert f"| {words} | {ours} | {dedicated} |" in readme
    ahead = {count: sum(one["ours"]["value"] > one["dedicated"]["value"] for one in own) for count, own in by_count.items()}
    assert ahead == {16: 3, 64: 1, 256: 1, "all": 0}
    sizes = [point for point in points if point["examples"] != "all"]
    assert all(one["ours"]["low"] < one["dedicated"]["high"] and one["dedicated"]["low"] < one["ours"]["high"] for one in sizes)


def test_the_page_of_reasons_shows_the_figures_of_the_study() -> None:
    found = load_claims("study")
    first, second, causes = found["claims"], found["second_reading"], found["causes"]
    ours, base = "all_answers", "in_context"
    labels = [one["methods"] for one in causes["one_label"].values()]
    lean = {name: [100 * fmean(own[name][at] for own in labels) for at in ("at_best_shots", "at_max")] for name in (ours, base)}
    validation = found["methods"][ours]["validation"]
    known = second["calibrated_validation"]
    gains = [max(own.values()) - max(found["methods"][name]["validation"].values()) for name, own in known.items()]
    few, sick = first["beats_few_shot"], first["beats_few_shot"]["by_task"]["sick"]
    again, slopes = second["claims"], second["more_shots_help"]
    led, lead = again["beats_few_shot"], again["beats_base"]
    less, tuned = second["pairs"]["ours_less"], second["pairs"]["less_untuned"]
    free_text = [first["beats_base"]["by_task"][task] for task in ("scitldr_abstract", "trec_factoid")]
    expected = [
        f"to {lean[base][0]:.0f}% of the queries at 4 shots and to {lean[base][1]:.0f}% at max, ours to {lean[ours][0]:.0f}% and "
        f"{lean[ours][1]:.0f}%",
        f"to {100 * causes['one_label']['sick']['methods'][ours]['at_max']:.0f}% and "
        f"{100 * causes['one_label']['boolq_short']['methods'][ours]['at_max']:.0f}% of the queries",
        f"it has {validation['4']:.1f} at 4 shots and {validation['max']:.1f} at max",
        f"costs ours {causes['choice'][ours]['cost']:.1f} points and `few_shot_16` {causes['choice']['few_shot_16']['cost']:.1f}",
        f"is +{shown(sick, ' there')}",
        f"the claim's {few['at_best_shots']['value']:.1f} is {few['without_task']['at_best_shots']['sick']:.1f}",
        f"by {min(gains):.1f} to {max(gains):.1f} points",
        f"ours is {shown(again['beats_base']['at_best_shots'], ' points ahead of the untuned model')}",
        f"`few_shot_5` is {shown(tuned['few_shot_5']['at_best_shots'], ' ahead')}",
        f"and `few_shot_16` {shown(tuned['few_shot_16']['at_best_shots'])}",
        f"behind `few_shot_5` by {shown(less['few_shot_5']['at_best_shots'], sign=-1)}",
        f"`reweighted` by {shown(less['reweighted']['at_best_shots'], sign=-1)}",
        f"at max `few_shot_16` by {shown(less['few_shot_16']['at_max'], sign=-1)}",
        f"without it the {-led['at_max']['value']:.1f} are {-led['without_task']['at_max']['sick']:.1f}",
        f"untuned model is {lead['without_task']['at_best_shots']['sick']:.1f} in place of {lead['at_best_shots']['value']:.1f}",
        f"ours gains {shown(slopes[ours], ' points a doubling')}, not shown; untuned {shown(slopes[base])}",
        f"ours is {shown(free_text[0], ' points over no tuning at 4 shots')}, on trec_factoid {shown(free_text[1])}",
    ]
    assert [words for words in expected if words not in flat_page("docs/results/why.md")] == []


def test_the_page_of_reasons_shows_the_training_seeds_of_the_study() -> None:
    found = load_claims("study")
    second, causes = found["second_reading"], found["causes"]
    moved = {name: max(own["max"].values()) - min(own["max"].values()) for name, own in found["training_seeds"].items()}
    left_out = found["family"]["by_method"]
    assert {one["verdict"] for one in left_out.values()} == {"not shown"}
    sixteen, five, zero = (causes["by_seed"][name]["max"] for name in ("few_shot_16", "few_shot_5", "zero_shot"))
    calm = {name: own["max"] for name, own in second["by_seed"].items()}
    seeds = {
        name: "{:.1f}, {:.1f} and {:.1f}".format(*(each["value"] for each in one["by_seed"].values()))
        for name, one in calm.items()
    }
    expected = [
        f"ours less `few_shot_5` is {seeds['few_shot_5']}, on the mean {shown(calm['few_shot_5']['mean'])}, and less "
        f"`few_shot_16` {seeds['few_shot_16']}, on the mean {shown(calm['few_shot_16']['mean'])}; less `zero_shot` it is "
        f"{shown(calm['zero_shot']['mean'])}, not shown",
        f"means over few-shot tuning are {calm['few_shot_5']['without_task']['sick']:.1f} and "
        f"{calm['few_shot_16']['without_task']['sick']:.1f}",
        f"ours moves by {moved['all_answers']:.1f} points at max, `few_shot_5` by {moved['few_shot_5']:.1f}, `few_shot_16` by "
        f"{moved['few_shot_16']:.1f} and `zero_shot` by {moved['zero_shot']:.1f}",
        f"ours less `few_shot_16` is {shown(sixteen['mean'])}, where one seed has {sixteen['by_seed']['0']['value']:.1f}",
        f"`few_shot_5` at max is {shown(left_out['few_shot_5']['at_max'])} on rte and sick, less `few_shot_16` "
        f"{shown(left_out['few_shot_16']['at_max'])}: not shown",
        f"without sms_spam the {five['mean']['value']:.1f} over `few_shot_5` are {five['without_task']['sms_spam']:.1f} and the "
        f"{zero['mean']['value']:.1f} over `zero_shot` are {zero['without_task']['sms_spam']:.1f}",
    ]
    assert [words for words in expected if words not in flat_page("docs/results/why.md")] == []


def test_the_page_of_reasons_is_of_the_study_as_it_is() -> None:
    page = (RESULTS / "why.md").read_text(encoding="utf-8")
    found = load_claims("study")
    second = found["second_reading"]
    for name, method in second["methods"].items():
        own = [reading["held_out"][str(reading["best_shots"])]["value"] for reading in (found["methods"][name], method)]
        assert name == "classic" or f"| {name} | {own[0]:.1f} | {own[1]:.1f} |" in page
    assert found["claims"]["beats_few_shot"]["against"] == "few_shot_5"
    assert [reading["best_shots"] for reading in found["methods"].values()].count(4) == 6
    assert {one["highest"] for one in found["causes"]["choice"].values()} == {"max"}
    assert {claim["verdict"] for claim in second["claims"].values()} == {"not shown"}
    assert second["methods"]["zero_shot"]["best_shots"] == 16
    by_seed = {name: own["max"] for name, own in found["training_seeds"].items()}
    assert min(by_seed["all_answers"], key=by_seed["all_answers"].__getitem__) == "0"
    assert max(by_seed["few_shot_16"], key=by_seed["few_shot_16"].__getitem__) == "0"
    records = read_records(RESULTS / "study" / "records.jsonl.gz")
    own = [one for one in records if (one.model, one.shots, one.condition) == ("all_answers/seed-0", "max", "")]
    validation = [one for one in own if one.role == "validation"]
    labels: dict[str, int] = {}
    for one in validation:
        labels[one.task] = max(labels.get(one.task, 0), len({*one.queries.predicted}))
    assert sorted(labels) == ["snli_sample", "subjectivity", "tweet_irony"]
    assert {task for task, count in labels.items() if count == 1} == {"snli_sample", "tweet_irony"}  # In every order.
    spam = [one for one in records if (one.task, one.shots, one.condition) == ("sms_spam", "max", "")]
    values = {name: [one.value for one in spam for seed in "012" if one.model == f"{name}/seed-{seed}"] for name in by_seed}
    others = [one for one in spam for seed in "012" if one.model in (f"few_shot_5/seed-{seed}", f"zero_shot/seed-{seed}")]
    assert (len(values["all_answers"]), len(others)) == (9, 18)
    assert min(values["all_answers"]) > max(one.value for one in others)
    assert min(Counter(one.queries.predicted).most_common(1)[0][1] for one in others) >= 94  # Of 100 queries.
    left_out = [one for one in records if "/family/" in one.model]
    assert sorted({one.task for one in left_out}) == ["rte", "sick"]
    for one in left_out:
        golds = Counter(one.queries.gold)
        assert one.value <= max(golds.values()) / sum(golds.values())


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/cells.json")), ids=lambda path: path.parent.name)
def test_the_pages_of_studies_are_made_from_their_results(path: Path) -> None:
    name = path.parent.name
    page = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    recipe = page.partition("Made by `manyicl study ")[2].partition("`")[0]
    assert (ROOT / recipe).is_file()
    assert load_benchmark("study_page").page(read_results(path.parent), name, recipe) == page


def test_the_report_of_the_study_is_made_from_its_results(tmp_path: Path) -> None:
    write_report(RESULTS / "study", tmp_path / "study.html")
    made, kept = ((folder / "study.html").read_text(encoding="utf-8") for folder in (tmp_path, RESULTS))
    command = re.compile(r"manyicl report \S+ --output \S+(?=</)")
    assert len(command.findall(kept)) > 20
    assert command.sub("", made) == command.sub("", kept)


def test_the_results_of_the_study_can_be_restored(tmp_path: Path) -> None:
    """As far as can be seen without the tasks: each record belongs to a cell, and what later cells ask for is there."""
    results = read_results(RESULTS / "study")
    assert len({record.key for record in results.records}) == len(results.records)
    assert sum(cell.num_records for cell in results.cells) == len(results.records)
    done = {cell.cell: cell for cell in results.cells if cell.status == "done"}
    assert {name for name, cell in done.items() if cell.kind == "rate" and "rate" not in cell.facts} == set()
    assert {name for name, cell in done.items() if cell.kind == "train" and not cell.facts["snapshots"]} == set()
    assert results.recipe["dtype"] == "bfloat16"
    assert len(results.examples) >= 20
