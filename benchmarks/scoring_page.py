"""The page of a scoring run: python benchmarks/scoring_page.py docs/results/scoring.json, which writes scoring.md beside it.

It reads agreement.json there too (benchmarks/agreement.py).
"""

import json
import sys
from pathlib import Path
from typing import Any

from manyicl.files import write_text_atomic

PEERS = {
    "transformers": "transformers",
    "lm_eval": "HFLM",
    "vllm_pick": "vLLM, constrained",
    "vllm_scores": "vLLM, prompt_logprobs",
}


def rate(cell: Any) -> str:
    """Queries per second of a cell; a star where it was scaled from fewer queries or labels."""
    if not isinstance(cell, dict):
        return "-"
    value = cell["queries_per_second"]
    return f"{value:.{1 if value >= 10 else 2 if value >= 0.1 else 4}f}" + ("*" if cell.get("extrapolated") else "")


def cell_lines(result: dict[str, Any]) -> list[str]:
    """Queries per second of ours and of every peer, by cell."""
    lines = [f"| prefix, labels | ours | share of the limit | best label alone | {' | '.join(PEERS.values())} |"]
    lines.append("|---|" + "---:|" * (3 + len(PEERS)))
    for name, own in result["ours"].items():
        peers = [rate(result["peers"][peer].get(name)) for peer in PEERS]
        search = rate(own.get("best_label_search"))
        lines.append(f"| {name} | {rate(own)} | {100 * own['share_of_limit']:.0f}% | {search} | {' | '.join(peers)} |")
    return lines


def figure_lines(figures: dict[str, float | None]) -> list[str]:
    """The stated figures, absent ones named."""
    lines = ["| figure | value |", "|---|---:|"]
    for name, value in figures.items():
        shown = (
            "not measured"
            if value is None
            else f"{100 * value:.0f}%"
            if name.startswith("share")
            else f"{value:,.0f}"
            if value >= 100
            else f"{value:.1f}"
        )
        lines.append(f"| {name} | {shown} |")
    return lines


def agreement_lines(result: dict[str, Any], agreement: dict[str, Any]) -> list[str]:
    """Agreement with full prompts on every query of some tasks, and with each peer over its cells."""
    lines = [
        f"Full prompts (transformers, SDPA, no cache) against ours, all in bf16, on 40 queries each of built-in tasks behind "
        f"{agreement['shots']} demonstrations.",
        "The control is transformers against itself: full prompts under its eager attention. The lead is that of the best label over",
        "the second where another is chosen, in nats. Made by `python benchmarks/agreement.py`, in [agreement.json](agreement.json).",
        "",
        "| model | task | labels | queries | ours: same best label | mean difference | lead | control: same best label | mean | lead |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for model, tasks in agreement["models"].items():
        totals = {"ours": 0.0, "control": 0.0}
        for name, own in tasks.items():
            cells = []
            for side in totals:
                found = own[side]
                totals[side] += found["same_best_label"] * own["queries"]
                cells.append(
                    f"{100 * found['same_best_label']:.1f}% | {found['mean_difference']:.3f} "
                    f"| {found['largest_lead_where_labels_differ']:.2f}"
                )
            lines.append(f"| {model} | {name} | {own['labels']} | {own['queries']} | {' | '.join(cells)} |")
        asked = sum(own["queries"] for own in tasks.values())
        ours, control = (f"{100 * total / asked:.1f}%" for total in totals.values())
        lines.append(f"| {model} | all | | {asked} | {ours} | | | {control} | | |")
    lines += [
        "",
        "Where two labels are this close, bf16 decides between them, in transformers against itself too. In the cells above the best",
        "label is that of each peer that scores labels, for every query that was compared; vLLM's constrained choice is another method:",
        "",
        "| peer | cells | queries | same best label, least | largest difference of a log-probability |",
        "|---|---:|---:|---:|---:|",
    ]
    for peer, title in PEERS.items():
        cells = result["agreement"].get(peer) or {}
        if cells:
            least = min(cell["same_best_label"] for cell in cells.values())
            worst = [cell["largest_difference"] for cell in cells.values() if "largest_difference" in cell]
            queries = sum(result["peers"][peer][name]["queries"] for name in cells)
            lines.append(f"| {title} | {len(cells)} | {queries} | {100 * least:.0f}% | {f'{max(worst):.2f}' if worst else '-'} |")
    return lines


def memory_line(memory: dict[str, Any], saved: dict[str, Any]) -> str:
    """What scoring takes beside model and prefix, and what a saved prefix saves."""
    beyond, prefix = memory["peak_beyond_model_and_prefix_bytes"] / 1e6, memory["prefix_bytes"] / 1e6
    return (
        f"Scoring 128 queries behind {memory['prefix_tokens']:,} tokens takes {beyond:.0f} MB beyond the loaded model and the "
        f"prefix ({prefix:.0f} MB), prefilling included (fresh process, high-water mark reset after loading). Opening and "
        f"verifying a saved prefix of {saved['tokens']:,} tokens takes {1000 * saved['open_seconds']:.1f} ms, prefilling it "
        f"{saved['prefill_seconds']:.2f} s: {saved['times_faster']:.0f} times."
    )


def page(result: dict[str, Any], agreement: dict[str, Any]) -> str:
    """The whole page as Markdown."""
    machine = result["machine"]
    where = f"{machine['processor']}, {machine['threads']} threads, no GPU; torch {machine['torch']}"
    rate_line = f"{result['limit']['matrix_rate_per_second'] / 1e9:.0f} GFLOP/s in this run"
    outside = result["peers"]["vllm_pick"].get("2700 tokens, 2 labels", {}).get("tokens_outside_blocks", 0)
    return "\n".join(
        [
            "# The speed of label scores behind a shared prefix",
            "",
            "Made by `make bench-scoring` (`benchmarks/scoring.py`); all numbers are those of [scoring.json](scoring.json).",
            f"{result['model']}; {where}, transformers {machine['transformers']}.",
            f"{result['seconds'] / 60:.0f} minutes in all. Made-up text with a fixed seed.",
            "",
            "## Figures",
            "",
            *figure_lines(result["figures"]),
            "",
            f"vLLM keeps whole blocks of 32 tokens (the smallest that it runs with here, and the fastest); the {outside} tokens",
            "of the prefix that are left over are computed for every query. The second line has a prefix that ends with a block.",
            "",
            "## Queries per second",
            "",
            "128 queries for ours. A star marks peers that were timed on fewer queries or labels and scaled by their number.",
            "`best label alone` is `find_best_labels`, which computes no other score. vLLM's constrained choice takes the most",
            "probable next token that some label still allows, which is not always the label of the highest score.",
            "",
            *cell_lines(result),
            "",
            "The limit is the operations that the queries' and labels' tokens need over the rate of bf16 matrix products at the",
            f"model's shapes, {rate_line}; the formula stands in the file.",
            "",
            "## Agreement",
            "",
            *agreement_lines(result, agreement),
            "",
            "## Memory and saved prefixes",
            "",
            memory_line(result["memory"], result["saved_prefix"]),
            "",
        ]
    )


def main() -> None:
    """Write the page beside the figures."""
    path = Path(sys.argv[1])
    result, agreement = (json.loads(each.read_text(encoding="utf-8")) for each in (path, path.with_name("agreement.json")))
    write_text_atomic(path.with_suffix(".md"), page(result, agreement))


if __name__ == "__main__":
    main()
