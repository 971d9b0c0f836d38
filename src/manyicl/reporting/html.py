"""A study's results -> one self-contained HTML file, readable offline, which asks the network for nothing.

In: the folder that `manyicl study` has written its results to. Out: text. What is missing is named as open; nothing is guessed.
Everything that comes from files is escaped, and scripts other than the page's own are refused by its content security policy.
"""

import base64
import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import yaml

from manyicl.errors import UserInputError
from manyicl.files import write_text_atomic
from manyicl.reporting import causes, curves, effects
from manyicl.reporting.answers import answer, claims_table, forgetting_sentence, forgetting_table, second_reading_table
from manyicl.reporting.charts import swatch
from manyicl.reporting.costs import budget_curves, failures, training_costs, work
from manyicl.reporting.curves import Figure
from manyicl.reporting.findings import Findings, demonstrations_at_max
from manyicl.results.files import StudyResults, read_results

try:
    import jinja2
except ImportError as error:
    raise UserInputError("Jinja2 is not installed. Type: pip install 'manyicl[report]'") from error


_SCORES = ("rate", "train", "evaluate", "classic")
# The kinds of cells that a section's figures are made of, with those that they need; a section that is not named is made of all.
KINDS = {
    "shots": _SCORES,
    "tasks": _SCORES,
    "forgetting": (*_SCORES, "forgetting", "harness"),
    "second-reading": (*_SCORES, "calibrated"),
    "budget": _SCORES,
    "robustness": ("rate", "train", "robustness"),
    "dedicated": (*_SCORES, "dedicated-rate", "dedicated"),
    "seeds": _SCORES,
    "causes": _SCORES,
    "family": _SCORES,
}


@dataclass(frozen=True)
class Section:
    """A part of the report; without figures, `open` says what it waits for.

    Attributes:
        figures: Those that can be drawn so far.
        commands: Those that make them, from the study's recipe on.
    """

    key: str
    title: str
    open: str
    figures: Sequence[Figure]
    paragraphs: Sequence[str] = field(default_factory=tuple)
    commands: Sequence[str] = field(default_factory=tuple)


def write_report(folder: Path, output: Path) -> StudyResults:
    """Write the report of a folder of results, in one step.

    Raises:
        RecordsError: the folder holds no results of a study, or broken ones.
        StorageError: `output` cannot be written.
    """
    results = read_results(folder)
    command = shlex.join(["manyicl", "report", str(folder), "--output", str(output)])
    write_text_atomic(output, render_report(results, command=command))
    return results


def render_report(results: StudyResults, *, command: str = "") -> str:
    """The report as HTML.

    Args:
        command: What was typed to make it.
    """
    findings = Findings(results)
    style, script = _asset("report.css"), _asset("report.js")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("manyicl.reporting", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        style=style,
        script=script,
        policy=_policy(style, script),
        answer=answer(findings),
        claims=claims_table(findings),
        sections=sections(findings, command=command),
        swatch=swatch,
        facts=_facts(findings),
        notes=_notes(findings),
        recipe=yaml.safe_dump(results.recipe, sort_keys=False, allow_unicode=True),
        commands=_commands(results, "", command),
        versions=_versions(results),
    )


def _against_others(findings: Findings) -> Figure | None:
    """What ours forgot less or more than each other method, as a table."""
    table = forgetting_table(findings)
    sentence = "Difference in bits per byte after whole budgets, equal in tokens; below zero ours forgets less."
    return Figure("forgets-less", "Ours against each other method", sentence, table, is_table_open=True) if table else None


def _second_reading(findings: Findings) -> list[Figure | None]:
    """Ours against others where each may be calibrated, and the same by training seed."""
    table = second_reading_table(findings)
    sentence = (
        "Label scores less what labels score after inputs that say nothing. Each method is read plain or calibrated, and at the "
        "shots, whichever is best for it on the validation tasks; points on held-out tasks."
    )
    by_seed = (findings.claims.get("second_reading") or {}).get("by_seed", {})
    return [
        Figure("second-reading", "Ours against others, calibrated", sentence, table, is_table_open=True) if table else None,
        causes.differences_by_seed("second-reading-seeds", "By training seed, calibrated where the first seed is", by_seed),
    ]


def _wait_for_calibrated(findings: Findings) -> str:
    """What the second reading waits for; nothing where the recipe does not ask for one."""
    is_asked = findings.recipe.get("calibrated")
    return "label tasks are not evaluated with calibrated scores for all methods." if is_asked else ""


def sections(findings: Findings, *, command: str = "") -> list[Section]:
    """The parts of the report after the claims, in reading order; a part that was not asked for is left out.

    Args:
        command: What was typed to make the report.
    """
    return [
        Section(
            key,
            title,
            "" if any(figures) else waiting,
            [figure for figure in figures if figure],
            paragraphs,
            _commands(findings.results, key, command),
        )
        for key, title, waiting, figures, paragraphs in _parts(findings)
        if waiting or any(figures)
    ]


_Part = tuple[str, str, str, Sequence[Figure | None], Sequence[str]]


def _parts(findings: Findings) -> list[_Part]:
    """Key, title, what it waits for, figures (None where one cannot be drawn) and paragraphs of each section."""
    return [
        (
            "shots",
            "Shots",
            "no method is evaluated on all held-out tasks at any number of shots.",
            [curves.shot_curves(findings), curves.family_curves(findings)],
            _max_words(findings),
        ),
        (
            "tasks",
            "Tasks",
            "no held-out task is evaluated.",
            [curves.task_differences(findings), curves.task_table(findings)],
            (),
        ),
        (
            "forgetting",
            "Forgetting",
            "bits per byte of plain text are not measured for a tuned model and the model that is not tuned.",
            [effects.forgetting_against_gain(findings), _against_others(findings), effects.harness_table(findings)],
            [sentence] if (sentence := forgetting_sentence(findings)) else (),
        ),
        ("second-reading", "Second reading", _wait_for_calibrated(findings), _second_reading(findings), ()),
        ("budget", "Budget", "no snapshot is evaluated on all held-out tasks.", [budget_curves(findings)], ()),
        (
            "robustness",
            "Robustness",
            "no altered demonstrations are evaluated for all methods on a task.",
            [effects.robustness(findings)],
            (),
        ),
        (
            "dedicated",
            "Dedicated tuning",
            "dedicated models are not evaluated on all held-out tasks, nor several sizes of them on one.",
            [effects.dedicated_differences(findings), effects.overtaking(findings)],
            (),
        ),
        ("seeds", "Training seeds", "no method is tuned with several seeds.", [effects.training_seeds(findings)], ()),
        ("causes", "Behind the claims", "", causes.tables(findings), ()),
        ("family", "A family left out", "this setting is not evaluated.", [effects.left_out_family(findings)], ()),
        (
            "costs",
            "Costs",
            "nothing is tuned.",
            [training_costs(findings), work(findings), failures(findings.results.cells)],
            (),
        ),
    ]


def _asset(name: str) -> str:
    return resources.files("manyicl.reporting").joinpath("assets", name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """A content security policy: nothing is fetched, and no style or script runs but these."""
    return f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _max_words(findings: Findings) -> Sequence[str]:
    found = demonstrations_at_max(findings.results.records)
    context = findings.recipe.get("context_tokens")
    if found is None:
        return ()
    room = f" in {context:,} tokens" if context else ""
    return [f"max is what fits{room}: {found[0]:,} to {found[1]:,} demonstrations, depending on task and order."]


def _facts(findings: Findings) -> list[str]:
    """What was compared on what, in words."""
    recipe, families = findings.recipe, findings.families()
    facts = [f"Model: {recipe['model']}."] if recipe.get("model") else []
    if families:
        num_tasks = sum(map(len, families.values()))
        facts.append(f"{num_tasks} held-out tasks in {len(families)} families; math is reported and is in no headline.")
    if recipe.get("budget_tokens"):
        facts.append(f"Budget of each jointly tuned method: {recipe['budget_tokens']:,} tokens.")
    queries = [record.num_queries for record in findings.results.records if record.role == "held_out"]
    if queries:
        span = str(min(queries)) if min(queries) == max(queries) else f"{min(queries)} to {max(queries)}"
        seeds = len({record.seed for record in findings.results.records})
        facts.append(f"{span} queries a task, {seeds} orders of demonstrations.")
    return facts


def _notes(findings: Findings) -> list[str]:
    """What a reader must know: of the models, and what the recipe says."""
    records = findings.results.records
    notes = sorted({f"{record.model_note}: this holds for every result here." for record in records if record.model_note})
    return [f"The model is {note}" for note in notes] + [str(note) for note in findings.recipe.get("notes", [])]


def _commands(results: StudyResults, section: str, command: str) -> list[str]:
    """The commands that make a section's figures, or with no section the whole report: the study's cells, then the page."""
    listed = {cell.kind for cell in results.cells}
    kinds = [kind for kind in KINDS.get(section, ()) if kind in listed]
    study = ["manyicl study study.yaml" + (f" --only {','.join(kinds)}" if kinds else "")]
    return [*(study if results.recipe else []), *([command] if command else [])]


def _versions(results: StudyResults) -> list[tuple[str, str]]:
    """Library and versions seen, over all cells and records."""
    found: dict[str, dict[str, None]] = {}
    sources = [*(cell.versions for cell in results.cells), *(record.versions for record in results.records)]
    for versions in sources:
        for name, version in versions.items():
            found.setdefault(name, {})[version] = None
    return [(name, ", ".join(versions)) for name, versions in sorted(found.items())]
