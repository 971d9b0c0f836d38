"""Published results are what their records say: no number of the tables was typed by hand."""

import json
from typing import Any

import pytest

from manyicl.planning import show_bytes
from manyicl.records import read_records
from manyicl.reporting.terminal import markdown_curves
from manyicl.training_plan import memory
from manyicl.training_plan.plans import CPU_SHARES
from result_fixtures import RESULTS, ROOT, load_benchmark, read_figures

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
