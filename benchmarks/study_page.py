"""The page of a study or ablation: python benchmarks/study_page.py runs/study-small/results docs/results/study RECIPE [OTHER]

Copies the results, which hold no weights and no text of a task, to the folder named, and makes a page of its name beside it.
Claims are computed anew from the records, by the code of the commit that is checked out. OTHER is a folder of results whose
records, but for those of dedicated models, are read beside this study's.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from manyicl.errors import UserInputError
from manyicl.files import write_text_atomic
from manyicl.records import EvaluationRecord
from manyicl.results.calibrated import CALIBRATED
from manyicl.results.claims import make_claims
from manyicl.results.contrasts import Term, estimate
from manyicl.results.dedicated import count_kept_back
from manyicl.results.files import ModelFacts, StudyResults, read_results, write_results
from manyicl.results.forgetting_card import CHAT
from manyicl.results.readings import FEW_SHOT, OURS

TITLES = {
    "study": "The study: every method with the same budget",
    "study-first": "The study as first run: 60 queries a task",
    "study-dedicated-short": "Dedicated tuning as it was first run, stopped early",
}
BESIDE = {
    "study": "The first run, 60 queries a task with weights from another processor, is kept: [study-first](study-first.md).\n"
    "So is dedicated tuning as it was first run, stopped early: [study-dedicated-short](study-dedicated-short.md).",
    "study-first": "The recipe asks for 100 queries since 27 November 2026; what it gives then is [the study](study.md).",
    "study-dedicated-short": "Dedicated tuning alone; what it is compared with are the records of [the study](study.md), which tunes longer.",
}
CLAIMS = {
    "beats_few_shot": "beats few-shot fine-tuning",
    "beats_zero_shot": "beats zero-shot fine-tuning",
    "beats_last_answer": "beats many-shot tuning on the last answer",
    "beats_base": "beats the model that was not tuned",
}


def points(found: dict[str, Any] | None) -> str:
    """A value in points with its interval."""
    if not found or found["value"] is None:
        return "-"
    if found["low"] is None:
        return f"{found['value']:.1f} (no interval)"
    return f"{found['value']:.1f} ({found['low']:.1f} to {found['high']:.1f})"


def difference_lines(claims: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Differences on held-out tasks, in points."""
    lines = [
        "| claim | each at its best shots | both at max | best shots | aim | verdict |",
        "|---|---:|---:|---|---:|---|",
    ]
    for name, words in names.items():
        claim = claims.get(name)
        if claim is None:
            lines.append(f"| {words} | - | - | - | - | not evaluated yet |")
            continue
        shots = ", ".join(f"{method} {count}" for method, count in claim["best_shots"].items())
        aim = "-" if claim["aim"] is None else f"+{claim['aim']:g}"
        lines.append(
            f"| {words} | {points(claim['at_best_shots'])} | {points(claim['at_max'])} | {shots} | {aim} | {claim['verdict']} |"
        )
    return lines


def pair_lines(pairs: dict[str, dict[str, Any]]) -> list[str]:
    """Ours less every other method, and every tuned method less the untuned one."""
    names = list(dict.fromkeys([*pairs["ours_less"], *pairs["less_untuned"]]))
    lines = [
        "| method | ours less it, best shots | at max | it less in_context, best shots | at max |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in names:
        found = (pairs[group].get(name, {}).get(place) for group in pairs for place in ("at_best_shots", "at_max"))
        lines.append(f"| {name} | {' | '.join(points(one) for one in found)} |")
    return lines if names else []


def method_lines(methods: dict[str, Any], shots: list[Any]) -> list[str]:
    """Each method's headline by shots, at its best shots, and its worst order."""
    lines = [
        f"| method | {' | '.join(str(count) for count in shots)} | best shots (validation) | worst order there |",
        "|---|" + "---:|" * (len(shots) + 2),
    ]
    for name, method in methods.items():
        values = [points(method["held_out"].get(str(count))) for count in shots]
        worst = f"{method['worst_order']:.1f}" if "worst_order" in method else "-"
        lines.append(f"| {name} | {' | '.join(values)} | {method['best_shots']} | {worst} |")
    return lines


def math_lines(methods: dict[str, Any], shots: list[Any]) -> list[str]:
    """Math by shots, which is in no headline."""
    lines = [f"| method | {' | '.join(str(count) for count in shots)} |", "|---|" + "---:|" * len(shots)]
    for name, method in methods.items():
        if method["math"]:
            lines.append(f"| {name} | {' | '.join(points(method['math'].get(str(count))) for count in shots)} |")
    return lines if len(lines) > 2 else ["Not evaluated yet."]


def second_reading_lines(found: dict[str, Any]) -> list[str]:
    """The claims again with each method calibrated where that is better for it on validation tasks."""
    second = found.get("second_reading")
    if not second:
        return ["Not evaluated yet."]
    lines = [*difference_lines(second["claims"], CLAIMS), ""]
    lines += [
        "| method | best on validation, plain | best on validation, calibrated | held-out, at the better of the two |",
        "|---|---:|---:|---:|",
    ]
    for name, method in second["methods"].items():
        plain, calibrated = found["methods"][name]["validation"], second["calibrated_validation"].get(name)
        best = [
            f"{max(values.values()):.1f} at {max(values, key=lambda count: values[count])}" if values else "-"
            for values in (plain, calibrated)
        ]
        lines.append(f"| {name} | {best[0]} | {best[1]} | {points(method['held_out'].get(str(method['best_shots'])))} |")
    lines += ["", *pair_lines(second["pairs"]), "", *one_label_lines(second["one_label"])]
    lines += seed_difference_lines(second["by_seed"])
    if second["approaches_dedicated"]:
        lines += ["Ours so read against dedicated tuning:", "", *dedicated_lines(second["approaches_dedicated"])]
    return lines


def dedicated_lines(claim: dict[str, Any] | None) -> list[str]:
    """Ours less dedicated tuning."""
    if not claim or "dedicated_full" not in claim:
        return ["Not evaluated yet." if not claim else "Dedicated tuning learnt none of the tasks."]
    rows = {"dedicated_prefix": "the demonstrations of our prefix", "dedicated_full": "the whole train split"}
    lines = [
        f"On {', '.join(claim['tasks'])}, where dedicated tuning on the whole split is 5 points or more above the majority label.",
        "",
        f"| dedicated tuning on | ours less it, {claim['best_shots']} shots | at max | share of its gain over the base at 0 shots | at max |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, words in rows.items():
        shares = [claim[name][f"share_of_gain{place}"] for place in ("", "_at_max")]
        shown = ["-" if one["low"] is None else f"{one['value']:.2f} ({one['low']:.2f} to {one['high']:.2f})" for one in shares]
        differences = [points(claim[name][f"difference{place}"]) for place in ("", "_at_max")]
        lines.append(f"| {words} | {' | '.join([*differences, *shown])} |")
    others = [f"{task} ({gain:+.1f})" for task, gain in claim["not_learnt"].items()]
    return [*lines, "", f"Not learnt by it (points over the majority): {', '.join(others) or 'none'}."]


def passes_lines(results: StudyResults) -> list[str]:
    """How often dedicated models saw what they were tuned on, by method: the lowest and the highest of each."""
    limits = results.recipe["dedicated"]
    found: dict[str, list[ModelFacts]] = {}
    for facts in results.models:
        if facts.num_examples and facts.model.startswith("dedicated/"):
            found.setdefault(facts.method, []).append(facts)
    lines = [
        f"At most {limits['max_tokens']:,} tokens and {limits['max_epochs']} passes, rounded up to whole rows; stopped where the fifth",
        "kept back gets no better. The weights kept are the best by it, and may be earlier than the last that were trained.",
        "",
        "| dedicated models | models | updates | tokens | passes over what was trained on |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, models in found.items():
        passes = [
            facts.answers / (facts.num_examples - count_kept_back(facts.num_examples)) for facts in models if facts.num_examples
        ]
        spans = [
            f"{min(values):,} to {max(values):,}"
            for values in zip(*((facts.updates, facts.tokens) for facts in models), strict=True)
        ]
        lines.append(f"| {method} | {len(models)} | {' | '.join(spans)} | {min(passes):.1f} to {max(passes):.1f} |")
    return ["", *lines] if found else []


def rate_lines(results: StudyResults) -> list[str]:
    """Which rates dedicated models were tuned at, and which were chosen; nothing where each was tuned at one."""
    tried = {cell.cell: list(cell.facts.get("kept_back_losses", {})) for cell in results.cells}
    found: dict[str, dict[str, Counter[float]]] = {}
    for facts in results.models:
        if facts.model.startswith("dedicated/"):
            rates = " and ".join(tried.get(facts.model, [])) or "one rate"
            found.setdefault(facts.method, {}).setdefault(rates, Counter())[facts.learning_rate] += 1
    if not any(" and " in rates for by_rates in found.values() for rates in by_rates):
        return []
    lines = [
        "",
        "Where a model was tuned at several rates, the loss on the fifth kept back chose, and the figures above are of its choice.",
        "",
    ]
    for method, by_rates in found.items():
        words = [
            f"at {rates}: {', '.join(f'{rate:g} for {count}' for rate, count in sorted(chosen.items()))}"
            for rates, chosen in by_rates.items()
        ]
        lines.append(f"- {method}, tuned {'; '.join(words)}")
    return lines


def bits(change: dict[str, float] | None) -> str:
    """A change of bits per byte with its interval."""
    return f"{change['value']:+.4f} ({change['low']:+.4f} to {change['high']:+.4f})" if change else "-"


def forgetting_lines(card: dict[str, Any] | None) -> list[str]:
    """Change of bits per byte of the final weights, and ours less each other method."""
    if not card:
        return ["Not evaluated yet."]
    corpora = list(card["base_bits_per_byte"])
    lines = [
        f"| method | {' | '.join(f'{corpus}, change' for corpus in corpora)} | chat questions, points | ours forgets less |",
        "|---|" + "---:|" * (len(corpora) + 1) + "---|",
    ]
    for entry in card["models"]:
        if entry["is_final"] and entry["training_seed"] == 0:
            shown = [bits(entry["bits_per_byte_change"].get(corpus)) for corpus in corpora]
            chat = points(entry["chat_change"])
            lines.append(f"| {entry['method']} | {' | '.join(shown)} | {chat} | {card['verdicts'].get(entry['method'], '')} |")
    lines += ["", f"| ours less | {' | '.join(corpora)} |", "|---|" + "---:|" * len(corpora)]
    for method, changes in card["ours_less_other"].items():
        shown = [bits(changes.get(corpus)) for corpus in corpora]
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return [
        *lines,
        "",
        "Bits per byte, whole budgets, equal in tokens. Chat questions: the built-in suite in the chat format, no demonstrations.",
    ]


def slope_lines(claim: dict[str, Any] | None) -> list[str]:
    """Points per doubling of demonstrations."""
    if not claim:
        return ["Not evaluated yet."]
    return [
        f"Points per doubling of demonstrations: ours {points(claim['all_answers'])}, base {points(claim['in_context'])}, "
        f"difference {points(claim['difference'])}. More shots help ours: {claim['verdict']}."
    ]


def overtaking_lines(found: list[dict[str, Any]]) -> list[str]:
    """Ours and dedicated tuning by the number of examples; ours holds those of them that its context has room for."""
    lines = ["| task | examples | of them in our context | ours | dedicated |", "|---|---:|---:|---:|---:|"]
    rows = [
        f"| {point['task']} | {point['examples']} | {point['our_demonstrations']} | "
        f"{points(point['ours'])} | {points(point['dedicated'])} |"
        for point in found
        if point["ours"]
    ]
    return [*lines, *rows] if rows else ["Not evaluated yet."]


def budget_lines(curves: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Snapshots by what they had cost, so that equal answers and equal seconds can be read."""
    lines = [
        "| method | tokens | answers that are targets | seconds of training | at its best shots | at max |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows = []
    for method, snapshots in curves.items():
        rows += [
            f"| {method} | {one['tokens']:,} | {one['target_answers']:,} | {one['seconds']:.0f} | "
            f"{points(one['at_best_shots'])} | {points(one['at_max'])} |"
            for one in snapshots
            if one["at_max"]
        ]
    ours = [one["target_answers"] for one in curves.get(OURS, []) if one["at_max"]]
    fewer = [
        method for method, snapshots in curves.items() if ours and max(one["target_answers"] for one in snapshots) < min(ours)
    ]
    if fewer:
        rows += [
            "",
            f"At equal answers ours cannot be compared with {', '.join(fewer)}: they end with fewer than it has at its first point.",
        ]
    return [*lines, *rows] if rows else ["Not evaluated yet."]


def seed_lines(spread: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """The headline of each training seed."""
    if not spread:
        return ["Not evaluated yet."]
    lines = ["| method | at 0 shots, by seed | at max, by seed |", "|---|---|---|"]
    for method, by_shots in spread.items():
        shown = [", ".join(f"{value:.1f}" for value in by_shots[count].values()) or "-" for count in ("0", "max")]
        lines.append(f"| {method} | {shown[0]} | {shown[1]} |")
    return lines


def one_label_lines(found: dict[str, Any]) -> list[str]:
    """How often each method gives its commonest label, at its best shots and at max."""
    if not found:
        return []
    methods = list(dict.fromkeys(name for one in found.values() for name in one["methods"]))
    lines = [f"| task | commonest right label | {' | '.join(methods)} |", "|---|---:|" + "---:|" * len(methods)]
    for task, one in found.items():
        shown = (
            f"{100 * own['at_best_shots']:.0f}, {100 * own['at_max']:.0f}" if (own := one["methods"].get(name)) else "-"
            for name in methods
        )
        lines.append(f"| {task} | {100 * one['right']:.0f} | {' | '.join(shown)} |")
    note = (
        "Percent of the queries that are given a method's commonest label, at its best shots and at max. Where that is near 100,"
    )
    return [
        *lines,
        "",
        f"{note} the method",
        "reads nothing of the query: accuracy is the share of that label, macro-F1 is low.",
        "",
    ]


def seed_difference_lines(found: dict[str, Any]) -> list[str]:
    """Ours less each other method by training seed; nothing where there is one seed."""
    if not found:
        return []
    lines = ["| ours less | shots | by training seed | mean over seeds | verdict |", "|---|---|---|---:|---|"]
    for other, by_shots in found.items():
        for shots, one in by_shots.items():
            seeds = ", ".join(f"{own['value']:.1f}" for own in one["by_seed"].values())
            lines.append(f"| {other} | {shots} | {seeds} | {points(one['mean'])} | {one['verdict']} |")
    return [*lines, ""]


def cause_lines(causes: dict[str, Any]) -> list[str]:
    """Ours less each other method by training seed and by budget, and what the choice of shots costs."""
    if not causes["choice"]:
        return ["Not evaluated yet."]
    lines = one_label_lines(causes["one_label"])
    lines += seed_difference_lines(causes["by_seed"])
    if causes["by_budget"]:
        lines += ["| ours less | tokens | at its best shots | at max |", "|---|---:|---:|---:|"]
        for other, rows in causes["by_budget"].items():
            lines += [
                f"| {other} | {row['tokens']:,} | {points(row['at_best_shots'])} | {points(row['at_max'])} |" for row in rows
            ]
        lines += ["", "By budget, with the orders of demonstrations that all snapshots have.", ""]
    lines += ["| method | shots chosen | best on held-out tasks | points lost by the choice |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {one['chosen']} | {one['highest']} | {one['cost']:.1f} |" for name, one in causes["choice"].items()]
    return [*lines, "", "Held-out tasks choose nothing: the last table says what nobody may take."]


def family_lines(claim: dict[str, Any] | None) -> list[str]:
    """Ours less few-shot tuning where a whole family was left out of the training."""
    if not claim:
        return ["Not evaluated yet."]
    lines = []
    for method, found in claim["by_method"].items():
        tasks = ", ".join(f"{task} {points(one)}" for task, one in found["by_task"].items())
        lines.append(
            f"- Trained without any {claim['family']} task, ours less {method} at max: {points(found['at_max'])} "
            f"({found['verdict']}); {tasks}. At the shots chosen in the main setting: {points(found['at_best_shots'])}."
        )
    return [*lines, "", "Learning rates and shots are those of the main setting, in which tasks of the family are trained on."]


def robustness_lines(results: StudyResults) -> list[str]:
    """Headline of the tasks named for it by what was done to the demonstrations, final weights."""
    settings = results.recipe["robustness"]
    names = {method["model"]: name for name, method in results.claims["methods"].items() if name in settings["methods"]}
    found: dict[str, dict[str, dict[str, list[EvaluationRecord]]]] = {}
    for record in results.records:
        if record.model in names and record.condition and record.condition not in (CHAT, CALIBRATED):
            by_task = found.setdefault(record.condition, {}).setdefault(names[record.model], {})
            by_task.setdefault(record.task, []).append(record)
    whole = [all(set(by_task) == {*settings["tasks"]} for by_task in by_method.values()) for by_method in found.values()]
    methods = {*settings["methods"]}
    if not found or not all(whole) or any(set(by_method) != methods for by_method in found.values()):
        return ["Not evaluated for all yet."]
    lines = [f"| demonstrations | {' | '.join(names.values())} |", "|---|" + "---:|" * len(names)]
    for condition, by_method in found.items():
        values = [estimate({task: [Term(1.0, own)] for task, own in by_method[name].items()}) for name in names.values()]
        lines.append(f"| {condition} | {' | '.join(points(value.as_json()) for value in values)} |")
    start = f"Mean over families of {', '.join(settings['tasks'])}; {settings['num_shots']} demonstrations, under `context`"
    return [f"{start} all that fit in so many tokens.", "", *lines]


def progress_line(results: StudyResults) -> str:
    """How far the study is."""
    done = [cell for cell in results.cells if cell.status == "done"]
    failed = sum(cell.status == "failed" for cell in results.cells)
    hours = sum(cell.seconds for cell in done) / 3600
    return f"{len(done)} of {len(results.cells)} cells are done, {failed} failed; {hours:.1f} hours of cells so far."


def sections(results: StudyResults) -> list[tuple[str, list[str]]]:
    """Headings and lines of what this study asks; what it does not ask is left out."""
    found, recipe = results.claims, results.recipe
    claims, methods = found["claims"], recipe["methods"]
    is_compared = methods != ["dedicated"]
    parts = [
        ("Differences on held-out tasks", difference_lines(claims, CLAIMS), bool({"in_context", *FEW_SHOT} & {*methods})),
        (
            "Variants less what they are variants of",
            difference_lines(found["variants"], {name: name for name in recipe["variants"]}),
            recipe["variants"],
        ),
        ("All pairs", pair_lines(found["pairs"]), is_compared),
        ("Methods by shots", method_lines(found["methods"], recipe["shots"]), is_compared),
        ("Math, apart", math_lines(found["methods"], recipe["shots"]), is_compared),
        ("The second reading: calibrated where validation tasks want it", second_reading_lines(found), recipe.get("calibrated")),
        (
            "Against dedicated tuning",
            [*dedicated_lines(claims.get("approaches_dedicated")), *passes_lines(results), *rate_lines(results)],
            "dedicated" in methods,
        ),
        ("Where dedicated tuning overtakes", overtaking_lines(found["overtaking"]), recipe["dedicated"]["overtaking_tasks"]),
        ("More shots", slope_lines(claims.get("more_shots_help")), "in_context" in methods),
        (
            "Equal answers, equal seconds",
            [
                *budget_lines(found["budget_curves"]),
                "",
                f"Before the end of a training, {recipe['num_snapshot_seeds']} of {recipe['num_seeds']} orders are read.",
            ],
            is_compared and recipe["num_snapshots"] > 1,
        ),
        ("Training seeds", seed_lines(found["training_seeds"]), recipe["training_seeds"]),
        ("Behind the claims", cause_lines(found["causes"]), is_compared),
        ("A family left out", family_lines(found["family"]), recipe["held_out_family"]),
        ("Altered demonstrations", robustness_lines(results), recipe["robustness"]["tasks"]),
        (
            "Forgetting",
            [
                *forgetting_lines(claims.get("forgets_less")),
                *([] if results.harness else ["", "No task of lm-evaluation-harness was run."]),
            ],
            recipe["forgetting"]["corpora"],
        ),
        ("What a reader must know", [f"- {note}" for note in recipe["notes"]], True),
    ]
    return [(title, lines) for title, lines, is_asked in parts if is_asked and lines]


def missing_line(results: StudyResults) -> list[str]:
    """The tasks that final weights were not evaluated on; nothing where there are none."""
    finals = {method["model"] for method in results.claims["methods"].values()}
    names = [cell.cell.removeprefix("evaluate/").rpartition("/") for cell in results.cells if cell.status != "done"]
    missing = sorted({task for model, _, task in names if model in finals})
    return [f"Not evaluated for all methods: {', '.join(missing)}."] if missing else []


def page(results: StudyResults, name: str, recipe_path: str) -> str:
    """The whole page as Markdown."""
    recipe = results.recipe
    budget = "" if recipe["methods"] == ["dedicated"] else f"{recipe['budget_tokens']:,} tokens a method; "
    several = len(recipe["rates"]["values"]) > 1
    versions = next((cell.versions for cell in results.cells if cell.versions), {})
    lines = [
        f"# {TITLES.get(name, 'Ablation: ' + name.removeprefix('ablation-'))}",
        "",
        f"Made by `manyicl study {recipe_path}` and `python benchmarks/study_page.py`; every number is in [{name}]({name}).",
        f"{progress_line(results)} Two processor cores, no GPU, {recipe['dtype']}; torch {versions.get('torch')}, transformers {versions.get('transformers')}.",
        f"{budget}{recipe['num_queries']} queries a task, {recipe['num_seeds']} orders of demonstrations.",
        "Points are 0 to 100: mean over the held-out tasks of a family, then over families, without math; in brackets the 95%",
        f"interval of a bootstrap over tasks, queries and orders. {'Shots and rates' if several else 'Shots'} are chosen on validation tasks.",
        *missing_line(results),
        *([BESIDE[name]] if name in BESIDE else []),
        "",
    ]
    for title, body in sections(results):
        lines += [f"## {title}", "", *body, ""]
    return "\n".join(lines)


def join_results(results: StudyResults, other: StudyResults) -> StudyResults:
    """The results of another study, in which dedicated models, also those not done yet, are this one's.

    Raises:
        UserInputError: they were not evaluated in the same way.
    """
    keys = ("model", "dtype", "tasks", "context_tokens", "num_seeds", "num_queries")
    if differing := [key for key in keys if results.recipe[key] != other.recipe[key]]:
        raise UserInputError(f"the two studies differ in {', '.join(differing)}, so that their records do not compare.")
    records = [record for record in other.records if not record.method.startswith("dedicated")]
    models = [facts for facts in other.models if not facts.method.startswith("dedicated")]
    return other.model_copy(update={"records": records + results.records, "models": models + results.models})


def main() -> None:
    """Copy the results and write the page."""
    source, target, recipe_path = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    results = read_results(source)
    recipe = results.recipe | {"output": f"runs/{target.name}"}  # No path of the machine it was made on.
    read = join_results(results, read_results(Path(sys.argv[4]))) if len(sys.argv) > 4 else results
    results = results.model_copy(update={"claims": make_claims(read), "recipe": recipe})
    write_results(results, target)
    write_text_atomic(target.with_suffix(".md"), page(results, target.name, recipe_path))


if __name__ == "__main__":
    main()
