"""The page of a serving run: python benchmarks/serving_page.py docs/results/serving.json, which writes serving.md beside it."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from manyicl.files import write_text_atomic


def figure_lines(result: dict[str, Any]) -> list[str]:
    """The figures that this project holds itself to."""
    posted, throughput, latency, restart = (result[name] for name in ("posted_to_answer", "throughput", "latency", "restart"))
    to_vllm = f"{throughput['ratio_to_vllm']:.2f} times" if "ratio_to_vllm" in throughput else "vLLM was absent"
    overload = result["overload"]
    bare = throughput["ratio_to_batches_of_callers"], throughput["ratio_to_all_at_once"]
    return [
        "| figure | must | aim | found |",
        "|---|---:|---:|---:|",
        f"| from posted file ({result['task']['examples']} examples) to first answer, over the bare prefill | 3 | 1.3 | "
        f"{posted['ratio']:.2f} |",
        f"| queries/s of {result['task']['callers']} callers over the bare engine with batches as large | 60% | 85% | {bare[0]:.0%} |",
        f"| the same over the bare engine with all {result['task']['queries']} queries in one call | | | {bare[1]:.0%} |",
        f"| queries/s over vLLM's own server | 1.5 | 2.5 | {to_vllm} |",
        f"| added latency, one caller, p50 | 15 ms | 5 ms | {latency['added_p50_ms']:.1f} ms |",
        f"| restart with {restart['tasks']} tasks until ready, beyond import and model load | 2 s | 0.5 s | "
        f"{restart['beyond_seconds']:.2f} s |",
        f"| admitted requests at {overload['overloaded']['times_capacity']} times the capacity, p50 over that of a full queue without "
        f"others | as before | | {overload['admitted_p50_over_full']:.2f} |",
        f"| the same over p50 at the capacity's own rate, which does not fill the queue | | | "
        f"{overload['admitted_p50_over_at_capacity']:.2f} |",
        f"| refused requests, p50 | at once | | {overload['overloaded']['statuses']['429']['p50_ms']:.1f} ms |",
    ]


def detail_lines(result: dict[str, Any]) -> list[str]:
    """What stands behind the figures."""
    throughput, latency, beside = result["throughput"], result["latency"], result["during_prefill"]
    rounds = throughput["rounds"]
    agreement, restart, posted = result["agreement"], result["restart"], result["posted_to_answer"]
    names = {"served": "the service", "batches_of_callers": "bare engine, batches as large as there are callers"}
    names |= {"all_at_once": "bare engine, one call", "vllm": "vLLM's server"}
    names |= {"vllm_on_whole_blocks": "vLLM's server, prefix cut to what its cache holds"}
    lines = ["| queries/s | median | rounds |", "|---|---:|---|"]
    for name, shown in names.items():
        if name in rounds[0]:
            values = [own[name] for own in rounds]
            lines.append(f"| {shown} | {statistics.median(values):.1f} | {', '.join(f'{value:.1f}' for value in values)} |")
    lines += [
        "",
        f"- Agreement with the bare engine: the same best label for {agreement['same_best_label']:.1%} of queries, probabilities off "
        f"by {agreement['mean_change']:.4f} on average and {agreement['largest_change']:.3f} at most. The service computes a prefix in "
        "slices, between which it answers; bf16 rounds those in other places than one pass.",
    ]
    if "same_label_as_vllm" in throughput:
        lines.append(
            f"- vLLM {throughput['vllm']['version']} gives the label of the service for {throughput['same_label_as_vllm']:.1%} of "
            "queries: it picks token by token among the labels (structured outputs), the service by the score of whole labels, and "
            "gives the probability of every label too. vLLM keeps whole blocks of "
            f"{throughput['vllm']['block_tokens']} tokens: {throughput['vllm']['tokens_outside_blocks']} tokens of the prefix are computed again for each query, and in the row "
            "without them the prefix is another one, cut short."
        )
    lines += [
        f"- From file to answer: {_seconds(posted['served_seconds'])}; bare prefill {_seconds(posted['bare_prefill_seconds'])}, each "
        "round with other examples.",
        f"- One caller: bare {latency['bare_p50_ms']:.1f} ms, served {latency['served_p50_ms']:.1f} ms (p50 of {latency['pairs']} pairs; what is added "
        "is the median of the differences).",
        f"- While another task of {result['task']['examples']} examples is prepared, one caller's queries take "
        f"{beside['beside_p50_ms']:.0f} ms (p50; {beside['beside_max_ms']:.0f} at most), beside {beside['alone_p50_ms']:.0f} ms alone.",
        f"- Restart: ready after {_seconds(restart['ready_seconds'])}; a process that imports the engine and loads the model took "
        f"{_seconds(restart['import_and_load_seconds'])}. First answers of the {restart['tasks']} tasks, each opened from disk: "
        f"{statistics.median(restart['first_answers_p50_ms']):.0f} ms (p50).",
    ]
    return lines


def overload_lines(overload: dict[str, Any]) -> list[str]:
    """Requests beyond what can be answered."""
    many = overload["overloaded"]
    lines = [
        f"Requests are sent at a steady rate for {many['wanted_seconds']} seconds, answered or not, by another process that shares the "
        "processors with the service; times are counted from when a request was due. The service had "
        f"`--max-queue {overload['max_queue']}`: where the queue is full, a query waits for the pass that runs and then for its own.",
        "",
        "| requests/s wanted | sent | answered | p50 | p95 | refused (429) | p50 | p95 |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for flood in (overload["at_capacity"], many):
        admitted = flood["statuses"]["200"]
        refused = flood["statuses"].get("429", {"count": 0, "p50_ms": 0.0, "p95_ms": 0.0})
        lines.append(
            f"| {flood['wanted_per_second']:,.0f} | {flood['sent_per_second']:,.0f} | {admitted['count']:,} | {admitted['p50_ms']:,.0f} ms "
            f"| {admitted['p95_ms']:,.0f} ms | {refused['count']:,} | {refused['p50_ms']:,.1f} ms | {refused['p95_ms']:,.1f} ms |"
        )
    return [
        *lines,
        "",
        "Callers who wait for their answers before they send the next query, and nobody else:",
        "",
        "| | queries/s | p50 |",
        "|---|---:|---:|",
        *(
            f"| {overload[name]['callers']} callers{shown} | {overload[name]['queries_per_second']:.1f} | {overload[name]['p50_ms']:,.0f} ms |"
            for name, shown in (
                ("before", " before: all share a pass, and none waits"),
                ("full", ": the queue is full"),
                ("after", " afterwards"),
            )
        ),
        "",
        f"Answered under {many['times_capacity']} times the load: {many['admitted_per_second']:.1f} a second. There was no other status.",
    ]


def _seconds(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values) + " s"


def make_page(result: dict[str, Any]) -> str:
    """The whole page."""
    machine = result["machine"]
    lines = [
        "# The service over HTTP",
        "",
        f"`{' '.join(result['command'])}`, {result['seconds_in_all'] / 60:.0f} minutes: {machine['processor']}, {result['threads']} threads, "
        f"torch {machine['torch']}, transformers {machine['transformers']}, Python {machine['python']}. The model is {result['model']}; the "
        f"task has {result['task']['examples']} made-up examples ({result['task']['prefix_tokens']:,} tokens) of "
        f"{len(result['task']['labels'])} labels. Services run as processes of their own, the bare engine in a third; they take turns. "
        "Everything measured is in [serving.json](serving.json).",
        "",
        *figure_lines(result),
        "",
        "## Behind the figures",
        "",
        *detail_lines(result),
        "",
        "## Overload",
        "",
        *overload_lines(result["overload"]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the result and write the page."""
    source = Path(sys.argv[1])
    write_text_atomic(source.with_suffix(".md"), make_page(json.loads(source.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
