"""Published results are what their records say: no number of the tables was typed by hand."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml

from manyicl.planning import show_bytes
from manyicl.records import read_records
from manyicl.reporting.html import write_report
from manyicl.reporting.terminal import markdown_curves
from manyicl.results.files import read_results
from manyicl.training_plan import memory
from manyicl.training_plan.plans import CPU_SHARES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = (RESULTS / "foundation.md").read_text(encoding="utf-8")


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def mean_rows() -> dict[str, list[str]]:
    """The page's means over tasks by model, one cell per number of shots."""
    rows = [cells_of(line) for line in PAGE.splitlines() if line.startswith("| mean over tasks ")]
    return {model: values for _, _, model, *values in rows}


def test_the_table_of_the_foundation_is_that_of_its_records() -> None:
    records = read_records(RESULTS / "foundation" / "records.jsonl.gz")
    shown = [
        record.model_copy(update={"model": "base" if record.model == "default" else "tuned"})
        for record in records
        if f"\n| {record.task} | {record.metric} | tuned |" in PAGE
    ]
    lines = markdown_curves(shown).splitlines()
    assert len(lines) > 16
    assert [line for line in PAGE.splitlines() if line in lines and line] == [line for line in lines if line]
    assert {record.num_queries for record in shown} == {100}
    assert {record.seed for record in shown} == {0, 1, 2}


def test_the_readme_shows_the_means_of_the_page() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Results")[2].partition("\n## ")[0]
    rows = [cells_of(line) for line in section.splitlines() if line.startswith(("| base", "| tuned"))]
    assert {model: values for model, *values in rows} == mean_rows()
    assert len(rows) == 2


def test_figures_of_training_are_those_of_the_files() -> None:
    speed = json.loads((RESULTS / "foundation" / "speed.json").read_text(encoding="utf-8"))
    assert f"| tokens | {speed['tokens']:,} |" in PAGE
    assert f"| tokens/s | {speed['tokens'] / speed['seconds']:.0f} |" in PAGE
    share = speed["operations"] / speed["matrix_rate_per_second"] / speed["seconds"]
    assert f"| share of that rate | {100 * share:.0f}% |" in PAGE
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{speed['tokens']:,} tokens" in " ".join(readme.split())


def test_the_page_on_prefixes_shows_the_figures_of_its_file() -> None:
    page = " ".join((ROOT / "docs" / "how-to" / "keep-a-prefix.md").read_text(encoding="utf-8").split())
    figures = json.loads((RESULTS / "prefix-files.json").read_text(encoding="utf-8"))
    files = figures["files"]
    assert f"{files['prefix_tokens']:,} tokens took the default model {files['prefill_seconds']:.1f} seconds." in page
    assert f"opened and verified in {1000 * files['plain']['first_open_seconds']:.1f} milliseconds" in page
    rows = 0
    for name in ("bf16 -> bf16 int8", "fp32 -> bf16", "fp32 -> bf16 int8", "fp32 -> fp32 int8"):
        shown = []
        for task in figures["int8"]:
            change = task["changes"][name]
            # Shares are rounded half to even, as Python does: 92.5% is shown as 92%.
            shown += [f"{change['mean']:.3f}", f"{change['max']:.2f}", f"{100 * change['argmax_agreement']:.0f}%"]
        label = name.replace("->", "→").replace("bf16 int8", "bf16, int8").replace("fp32 int8", "fp32, int8")
        rows += f"| {label} | {' | '.join(shown)} |" in page
    assert rows == 4


def load_benchmark(name: str) -> Any:
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_figures(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def load_claims(name: str) -> Any:
    return read_figures(f"{name}/claims")


def test_the_page_on_scores_is_made_from_its_file() -> None:
    figures = read_figures("scoring")
    assert (RESULTS / "scoring.md").read_text(encoding="utf-8") == load_benchmark("scoring_page").page(
        figures, read_figures("agreement")
    )
    assert all(value is not None for value in figures["figures"].values())
    exact = [figures["agreement"][peer] for peer in ("transformers", "lm_eval", "vllm_scores")]
    assert {cell["same_best_label"] for cells in exact for cell in cells.values()} == {1.0}


def test_the_page_on_training_is_made_from_its_files() -> None:
    page = load_benchmark("training_page").read_page(RESULTS)
    assert (RESULTS / "training-speed.md").read_text(encoding="utf-8") == page


def test_the_page_on_selection_shows_the_figures_of_its_file() -> None:
    page = (ROOT / "docs" / "how-to" / "more-examples-than-fit.md").read_text(encoding="utf-8")
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    for row in read_figures("selection")["results"]:
        cells.setdefault((row["task"], row["demonstrations"]), {})[row["selection"]] = row
    for (task, demonstrations), found in cells.items():
        rows = [found[name] for name in ("random", "hybrid", "nearest")]
        values = " | ".join(f"{100 * row['value']:.1f}" for row in rows)
        times = " | ".join(f"{row['milliseconds_per_query']:.0f}" for row in rows)
        assert f"| {task} | {rows[0]['metric']} | {demonstrations} | {values} | {times} |" in page
    assert len(cells) == 6


def test_the_page_on_plans_shows_the_figures_of_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    page = (ROOT / "docs" / "how-to" / "plan-a-run.md").read_text(encoding="utf-8")
    figures = read_figures("planning")
    assert figures["within"] == {"memory": True, "time": True}
    assert list(figures["configurations"]) == list(load_benchmark("planning").CONFIGURATIONS)
    rows = []
    for name, cell in figures["configurations"].items():
        assert abs(cell["memory_error"]) <= 0.15
        assert abs(cell["time_error"]) <= 0.25
        memory = [show_bytes(cell[f"{kind}_bytes"]) for kind in ("measured", "predicted")]
        seconds = [f"{cell[f'{kind}_seconds']:.3g} s" for kind in ("measured", "predicted")]
        shown = [*memory, f"{cell['memory_error']:+.0%}", *seconds, f"{cell['time_error']:+.0%}"]
        rows.append(f"| {name} | {' | '.join(shown)} |")
    section = page.partition("## Checked against measurement")[2].partition("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("|")][2:] == rows
    machine = figures["machine"]
    assert (
        f"{machine['processor']}, {machine['threads']} threads; torch {machine['torch']}, "
        f"transformers {machine['transformers']}." in " ".join(section.split())
    )


def test_the_page_on_plans_states_the_constants() -> None:
    page = " ".join((ROOT / "docs" / "how-to" / "plan-a-run.md").read_text(encoding="utf-8").split())
    shares = ", ".join(f"{getattr(CPU_SHARES, name):.0%} ({name})" for name in ("linear", "attention", "masked", "repeated"))
    assert f"the shares of the matrix rate that are reached: {shares}." in page
    assert (memory.CPU_RUNTIME_BYTES, memory.CPU_HOLES_OF_KEPT, memory.CPU_HOLES_OF_WORK) == (70_000_000, 0.2, 5)
    holes = (
        "70 MB for libraries and buffers, holes in the heap of a fifth of the activations and five times the work of one layer"
    )
    assert holes in page


def test_the_readme_shows_the_speed_of_the_files() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    cell, scores = read_figures("training-speed")["rows"]["2048"], read_figures("scoring")["figures"]
    assert f"{cell['times_tokens_per_second']:.1f} times the tokens a second of TRL's `SFTTrainer`" in readme
    assert f"{cell['memory_ratio']:.2f} of its memory" in readme
    assert f"{scores['times vLLM constrained, 2700 tokens, 2 labels']:.1f} times vLLM" in readme


def test_the_readme_shows_the_claims_of_the_study() -> None:
    found = load_claims("study")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {
        "beats_few_shot": "few-shot tuning",
        "beats_zero_shot": "zero-shot tuning",
        "beats_last_answer": "many-shot tuning on the last answer",
        "beats_base": "no tuning",
    }

    def shown(estimate: dict[str, float]) -> str:
        return f"{estimate['value']:.1f} ({estimate['low']:.1f} to {estimate['high']:.1f})"

    second = found["second_reading"]
    for name, words in names.items():
        values = [reading["claims"][name][place] for reading in (found, second) for place in ("at_best_shots", "at_max")]
        assert f"| {words} | {' | '.join(map(shown, values))} |" in readme
    verdicts = {name: found["claims"][name]["verdict"] for name in names}
    assert verdicts == dict.fromkeys(names, "not shown") | {"beats_base": "holds"}
    assert {second["claims"][name]["verdict"] for name in names} == {"not shown"}
    first = load_claims("study-first")
    assert [name for name in names if first["claims"][name]["verdict"] != "holds"] == ["beats_few_shot"]
    untuned = [claims["methods"]["in_context"]["held_out"] for claims in (found, first)]
    assert all(abs(untuned[0][shots]["value"] - untuned[1][shots]["value"]) < 0.5 for shots in untuned[0])
    flat = " ".join(readme.split())
    dedicated, again = found["claims"]["approaches_dedicated"], second["approaches_dedicated"]
    for name, words in (
        ("dedicated_prefix", "one dedicated model a task, tuned on the same demonstrations as ours at max"),
        ("dedicated_full", "one dedicated model a task, tuned on the whole train split"),
    ):
        values = [reading[name][f"difference{place}"] for reading in (dedicated, again) for place in ("", "_at_max")]
        assert f"| {words} | {' | '.join(map(shown, values))} |" in readme
    shares = [dedicated["dedicated_prefix"]["share_of_gain_at_max"], again["dedicated_prefix"]["share_of_gain"]]
    percent = [[f"{100 * share[end]:.0f}%" for end in ("value", "low", "high")] for share in shares]
    short = load_claims("study-dedicated-short")["claims"]["approaches_dedicated"]["dedicated_prefix"]["difference_at_max"]
    assert all(low["low"] < 0 < low["high"] for low in (dedicated["dedicated_prefix"]["difference_at_max"], short))
    five = second["pairs"]["ours_less"]["few_shot_5"]["at_best_shots"]
    untuned = [reading["methods"]["in_context"] for reading in (found, second)]
    plain, calibrated = (method["held_out"][str(method["best_shots"])]["value"] for method in untuned)
    at_max = untuned[0]["held_out"]["max"]["value"]
    reweighted = second["pairs"]["ours_less"]["reweighted"]["at_best_shots"]
    best = dedicated["dedicated_prefix"]["difference"]
    slope = found["claims"]["more_shots_help"]["all_answers"]
    ours = [reading["methods"]["all_answers"]["held_out"]["max"]["value"] for reading in (found, second)]
    expected = [
        f"by {-second['claims']['beats_few_shot']['at_max']['value']:.1f} points at max, on 5 by {-five['value']:.1f} "
        f"({-five['high']:.1f} to {-five['low']:.1f})",
        f"lifts the untuned model from {plain:.1f} to {calibrated:.1f}",
        f"{at_max - plain:.1f} points are of more shots: calibrated it is read at {untuned[1]['best_shots']}, before at "
        f"{untuned[0]['best_shots']}, and not calibrated it has {at_max:.1f} at max",
        f"in the second reading, by {-reweighted['value']:.1f} ({-reweighted['high']:.1f} to {-reweighted['low']:.1f})",
        f"they are ahead, by {-best['value']:.1f} ({-best['high']:.1f} to {-best['low']:.1f})",
        f"ours has {percent[0][0]} of their gain over the untuned model at 0 shots ({percent[0][1]} to {percent[0][2]}), "
        f"{percent[1][0]} with our scores calibrated and theirs not ({percent[1][1]} to {percent[1][2]})",
        f"they were {-short['value']:.1f} points ahead ({-short['high']:.1f} to {-short['low']:.1f})",
        f"is not shown either: {shown(slope).replace(' (', ' points a doubling (')}",
        f"{found['methods']['classic']['held_out']['max']['value']:.1f} with the whole train split. Ours, with what fits, scores "
        f"{ours[0]:.1f} at max, and {ours[1]:.1f} calibrated",
    ]
    assert [words for words in expected if words not in flat] == []
    assert [reading["claims"]["beats_few_shot"]["against"] for reading in (found, second)] == ["few_shot_5", "few_shot_16"]
    assert found["claims"]["more_shots_help"]["verdict"] == "not shown"
    recipe = yaml.safe_load((RESULTS / "study" / "study.yaml").read_text(encoding="utf-8"))
    assert f"{recipe['budget_tokens']:,} tokens each" in readme
    assert f"all that fit in {recipe['context_tokens']:,} tokens" in readme


def test_the_scores_of_dedicated_rates_are_those_of_their_cells() -> None:
    results = read_results(RESULTS / "study")
    scores: dict[str, list[float]] = {}
    for cell in results.cells:
        if cell.kind == "dedicated-rate":
            scores.setdefault(cell.cell.rpartition("/")[2], []).append(100 * cell.facts["score"])
    means = {rate: f"{fmean(own):.1f}" for rate, own in scores.items()}
    (note,) = (note for note in results.recipe["notes"] if note.startswith("The rate of dedicated tuning is 2e-3."))
    assert f"2e-4, 6e-4 and 2e-3 had {means['0.0002']}, {means['0.0006']} and {means['0.002']} on" in note
    assert f"on a processor with AMX, {means['0.006']}." in note
    assert max(means, key=lambda rate: float(means[rate])) == "0.002"


def test_what_longer_tuning_did_to_dedicated_models_is_told() -> None:
    """Means over orders of those tuned on our demonstrations, as first run and tuned longer, on tasks that gain and that lose."""
    means: dict[str, dict[str, list[float]]] = {}
    labels: dict[tuple[str, str], list[int]] = {}
    for name in ("study-dedicated-short", "study"):
        for record in read_records(RESULTS / name / "records.jsonl.gz"):
            if record.method == "dedicated_prefix":
                means.setdefault(record.task, {}).setdefault(name, []).append(100 * record.value)
                labels.setdefault((name, record.task), []).append(len({*record.queries.predicted}))
    shown = {task: " to ".join(f"{fmean(values):.1f}" for values in own.values()) for task, own in means.items()}
    why = " ".join((RESULTS / "why.md").read_text(encoding="utf-8").split())
    gained = [f"{task} ({shown[task]})" for task in ("trec_question_type", "tweet_emotion", "snips_intent")]
    lost = [f"{task} ({shown[task]})" for task in ("scitldr_abstract", "sick", "sms_spam")]
    assert f"gain on {gained[0]}, {gained[1]} and {gained[2]} and lose on {lost[0]}, {lost[1]} and {lost[2]}." in why
    assert sorted(labels["study", "sms_spam"]) == [1, 1, 2]
    for name in ("study-dedicated-short", "study"):
        claim = load_claims(name)["claims"]["approaches_dedicated"]
        prefix, full = (claim[method]["difference_at_max"] for method in ("dedicated_prefix", "dedicated_full"))
        told = [f"{one['value']:.1f} ({one['low']:.1f} to {one['high']:.1f})" for one in (prefix, full)]
        assert [words for words in told if words not in why] == []


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
    page = " ".join((RESULTS / "why.md").read_text(encoding="utf-8").split())
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
    assert ahead == {16: 3, 64: 2, 256: 1, "all": 0}
    sizes = [point for point in points if point["examples"] != "all"]
    assert all(one["ours"]["low"] < one["dedicated"]["high"] and one["dedicated"]["low"] < one["ours"]["high"] for one in sizes)


def test_the_page_of_reasons_shows_the_figures_of_the_study() -> None:
    page = " ".join((RESULTS / "why.md").read_text(encoding="utf-8").split())
    found = load_claims("study")
    first, second, causes = found["claims"], found["second_reading"], found["causes"]
    ours, base = "all_answers", "in_context"
    labels = [one["methods"] for one in causes["one_label"].values()]
    lean = {name: [100 * fmean(own[name][at] for own in labels) for at in ("at_best_shots", "at_max")] for name in (ours, base)}
    validation = found["methods"][ours]["validation"]
    known = second["calibrated_validation"]
    gains = [max(own.values()) - max(found["methods"][name]["validation"].values()) for name, own in known.items()]
    few, sick = first["beats_few_shot"], first["beats_few_shot"]["by_task"]["sick"]
    again, slopes, dedicated = second["claims"], second["more_shots_help"], second["approaches_dedicated"]
    led, lead = again["beats_few_shot"], again["beats_base"]
    less, tuned = second["pairs"]["ours_less"], second["pairs"]["less_untuned"]
    free_text = [first["beats_base"]["by_task"][task] for task in ("scitldr_abstract", "trec_factoid")]

    def shown(one: dict[str, float], words: str = "", sign: int = 1) -> str:
        low, high = sorted((sign * one["low"], sign * one["high"]))
        return f"{sign * one['value']:.1f}{words} ({low:.1f} to {high:.1f})"

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
        f"same demonstrations is {shown(dedicated['dedicated_prefix']['difference'])}",
        f"{100 * dedicated['dedicated_prefix']['share_of_gain']['value']:.0f}% of its gain over the untuned model",
        f"on the whole train split {shown(dedicated['dedicated_full']['difference'])}",
        f"{100 * dedicated['dedicated_full']['share_of_gain']['value']:.0f}% of it",
        f"ours gains {shown(slopes[ours], ' points a doubling')}, not shown; untuned {shown(slopes[base])}",
        f"ours is {shown(free_text[0], ' points over no tuning at 4 shots')}, on trec_factoid {shown(free_text[1])}",
    ]
    moved = {name: max(own["max"].values()) - min(own["max"].values()) for name, own in found["training_seeds"].items()}
    left_out = found["family"]["by_method"]
    assert {one["verdict"] for one in left_out.values()} == {"not shown"}
    sixteen, five = (causes["by_seed"][name]["max"] for name in ("few_shot_16", "few_shot_5"))
    calm = {name: own["max"] for name, own in second["by_seed"].items()}
    seeds = {
        name: "{:.1f}, {:.1f} and {:.1f}".format(*(each["value"] for each in one["by_seed"].values()))
        for name, one in calm.items()
    }
    expected += [
        f"ours less `few_shot_5` is {seeds['few_shot_5']}, on the mean {shown(calm['few_shot_5']['mean'])}, and less "
        f"`few_shot_16` {seeds['few_shot_16']}, on the mean {shown(calm['few_shot_16']['mean'])}; less `zero_shot` it is "
        f"{shown(calm['zero_shot']['mean'])}, not shown",
        f"means over few-shot tuning are {calm['few_shot_5']['without_task']['sick']:.1f} and "
        f"{calm['few_shot_16']['without_task']['sick']:.1f}",
        f"ours moves by {moved[ours]:.1f} points at max, `few_shot_5` by {moved['few_shot_5']:.1f}, `few_shot_16` by "
        f"{moved['few_shot_16']:.1f} and `zero_shot` by {moved['zero_shot']:.1f}",
        f"ours less `few_shot_16` is {shown(sixteen['mean'])}, where one seed has {sixteen['by_seed']['0']['value']:.1f}",
        f"`few_shot_5` at max is {shown(left_out['few_shot_5']['at_max'])} on rte and sick, less `few_shot_16` "
        f"{shown(left_out['few_shot_16']['at_max'])}: not shown",
        f"without sms_spam the {five['mean']['value']:.1f} over `few_shot_5` are {five['without_task']['sms_spam']:.1f} and the "
        f"{causes['by_seed']['zero_shot']['max']['mean']['value']:.1f} over `zero_shot` are "
        f"{causes['by_seed']['zero_shot']['max']['without_task']['sms_spam']:.1f}",
    ]
    assert [words for words in expected if words not in page] == []


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
