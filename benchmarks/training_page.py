"""The page of a training run: python benchmarks/training_page.py docs/results, which reads the JSON files there.

training-speed.json (benchmarks/training.py), training-changes.json (the same with --changes) and objectives.json
(benchmarks/objectives.py) become training-speed.md.
"""

import json
import sys
from pathlib import Path
from typing import Any

from manyicl.files import write_text_atomic

# What was expected before a change was made, from the profile of the step as it then was: attention took 39% of it, element-wise
# work and conversions 27%, the vocabulary matrix for all positions 29% of a step of 2,048 tokens.
PREDICTED = {
    "without the attention kernel": "1.4 times",
    "without fewer activations": "1.15 times, half the memory",
    "without losses in the head": "nothing in time; logits of targets never whole in memory",
    "without all three": "",
}


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def speed_lines(cells: dict[str, Any]) -> list[str]:
    """Ours and TRL by length of rows."""
    lines = [
        "| tokens a row | ours, tokens/s | answers/s | share of the limit | peak beyond the model | TRL, tokens/s | its settings | its peak |"
        " times its speed | share of its memory |",
        "|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for length, cell in cells.items():
        own, name = cell["ours"], cell["best_trl_settings"]
        peer = cell["trl"][name]
        lines.append(
            f"| {int(length):,} | {own['tokens_per_second']:.0f} | {own['answers_per_second']:.1f} "
            f"| {100 * own['share_of_limit']:.0f}% | {gigabytes(own['peak_beyond_model_bytes'])} "
            f"| {peer['tokens_per_second']:.0f} | {name} | {gigabytes(peer['peak_beyond_model_bytes'])} "
            f"| {cell['times_tokens_per_second']:.1f} | {cell['memory_ratio']:.2f} |"
        )
    return lines


def setting_lines(cells: dict[str, Any]) -> list[str]:
    """TRL at every setting that was tried."""
    lines = ["| tokens a row | TRL's settings | tokens/s | peak beyond the model |", "|---:|---|---:|---:|"]
    for length, cell in cells.items():
        for name, found in cell["trl"].items():
            shown = f"{found['tokens_per_second']:.0f} | {gigabytes(found['peak_beyond_model_bytes'])}"
            lines.append(f"| {int(length):,} | {name} | {'failed | -' if 'absent' in found else shown} |")
    return lines


def change_lines(changes: dict[str, Any]) -> list[str]:
    """What each change brings: ours over ours without it."""
    whole = changes["everything"]
    lines = [
        "| change | expected | speed | memory |",
        "|---|---|---:|---:|",
    ]
    for name, expected in PREDICTED.items():
        found = changes[name]
        speed = whole["tokens_per_second"] / found["tokens_per_second"]
        memory = whole["peak_beyond_model_bytes"] / found["peak_beyond_model_bytes"]
        lines.append(f"| {name.removeprefix('without ')} | {expected} | {speed:.2f} times | {memory:.2f} |")
    return lines


def score_lines(found: dict[str, Any]) -> list[str]:
    """Scores of each trained model by shots."""
    names = list(found["by_shots"])
    shots = list(found["by_shots"][names[0]])
    cells = {name: " | ".join(f"{values[count]:.1f}" for count in shots) for name, values in found["by_shots"].items()}
    header = [f"| model | {' | '.join(shots)} |", "|---|" + "---:|" * len(shots)]
    return header + [f"| {name} | {cells[name]} |" for name in names]


def interval(difference: dict[str, Any]) -> str:
    """A difference in points with its interval."""
    return f"{difference['points']:+.1f} points (95% interval {difference['low']:.1f} to {difference['high']:.1f})"


def objective_lines(found: dict[str, Any], first: dict[str, Any] | None) -> list[str]:
    """All answers against the last answer at equal seconds; a first attempt stands beside it."""
    difference, updates = found["difference"], found["updates"]
    lines = [
        f"Two trainings of equal seconds ({updates['all_answers']} updates of `all_answers`, {updates['last_answer']} of `last_answer`),",
        f"read on the validation tasks, {found['queries_a_task']} queries and three orders each; each objective counts at the best of three rates.",
        f"All answers less the last answer: **{interval(difference)}**, bootstrap over",
        f"{difference['queries']} queries, one training seed. Made by `python benchmarks/objectives.py`.",
        "",
        *score_lines(found),
    ]
    if first:
        own, before = first["updates"], first["difference"]
        lines += [
            "",
            f"A first attempt trained {own['all_answers']} and {own['last_answer']} updates, read 100 queries, and gave `all_answers` one rate,",
            f"chosen before, where `last_answer` had the best of three: {interval(before)}",
            "([objectives-first.json](objectives-first.json)).",
        ]
    return lines


def fit_lines(fit: dict[str, float]) -> list[str]:
    """Cost against length."""
    even = fit["tokens_where_attention_costs_as_much_as_the_rest"]
    return [
        f"A token takes {1e3 * fit['seconds_per_token']:.2f} ms and {1e6 * fit['seconds_per_token_and_token_of_length']:.3f} µs for each",
        f"token of its row (largest error {100 * fit['largest_error_of_seconds']:.0f}%): from rows of {even:,.0f} tokens on, attention costs",
        f"more than all else. Memory beyond the model is {fit['fixed_bytes'] / 1e6:.0f} MB and {fit['bytes_per_token'] / 1e3:.0f} kB a token",
        f"(largest error {100 * fit['largest_error_of_memory']:.0f}%), linear in the row.",
    ]


def page(
    speed: dict[str, Any], changes: dict[str, Any], objectives: dict[str, Any] | None, first: dict[str, Any] | None = None
) -> str:
    """The whole page as Markdown."""
    machine, agreement = speed["machine"], speed["agreement"]
    versions = {found.get("trl") for cell in speed["rows"].values() for found in cell["trl"].values()} - {None}
    return "\n".join(
        [
            "# The speed and memory of tuning",
            "",
            "Made by `make bench-training` (`benchmarks/training.py`); all numbers are those of [training-speed.json](training-speed.json)",
            "and [training-changes.json](training-changes.json).",
            f"{speed['model']}; LoRA of rank {speed['lora']['rank']} on all linear layers, one row an update.",
            f"{machine['processor']}, {machine['threads']} threads, no GPU; torch {machine['torch']}, transformers",
            f"{machine['transformers']}, TRL {', '.join(sorted(versions))}. {speed['seconds'] / 60:.0f} minutes in all.",
            "",
            "## Against TRL's SFTTrainer",
            "",
            f"Same rows, targets and adapter. Mean losses differ by {agreement['float32']['difference_of_means']:.1e} in fp32 and",
            f"{agreement['bfloat16']['difference_of_means']:.1e} in bf16. TRL counts at the fastest of the settings below. Memory is the peak",
            "beyond the loaded model, in a fresh process whose high-water mark is reset after loading. One configuration of ours for all.",
            "",
            *speed_lines(speed["rows"]),
            "",
            *setting_lines(speed["rows"]),
            "",
            *([speed["remark"], ""] if speed.get("remark") else []),
            "The limit is the operations that an update needs over the rate of bf16 matrix products at the model's shapes,",
            f"{speed['limit']['matrix_rate_per_second'] / 1e9:.0f} GFLOP/s in this run; the formula stands in the file.",
            "",
            "## Length",
            "",
            *fit_lines(speed["fit"]),
            "",
            "## What each change brings",
            "",
            "Ours over ours without the change, rows of 2,048 tokens; memory as a share of that without it.",
            "",
            *change_lines(changes["changes"]),
            "",
            *(["## All answers against the last answer", "", *objective_lines(objectives, first), ""] if objectives else []),
        ]
    )


def read_page(folder: Path) -> str:
    """The page of the figures in a folder; without objectives.json it has no section on them."""
    paths = [folder / f"{name}.json" for name in ("training-speed", "training-changes", "objectives", "objectives-first")]
    speed, changes, objectives, first = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None for path in paths
    )
    return page(speed, changes, objectives, first)


def main() -> None:
    """Write the page beside the figures."""
    folder = Path(sys.argv[1])
    write_text_atomic(folder / "training-speed.md", read_page(folder))


if __name__ == "__main__":
    main()
