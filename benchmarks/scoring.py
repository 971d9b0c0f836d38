"""Label scores behind a shared prefix, ours against real peers: python benchmarks/scoring.py --output FILE

Default model, bf16, 2 threads, prefixes of about 1,000, 2,700 and 7,500 tokens, label sets of 2, 77 and 150; made-up text. Ours
scores 128 queries. Peers get the same token ids in the same run: (a) transformers with the full prompt of a query and label;
(b) lm-evaluation-harness' HFLM; (c) vLLM on the processor with prefix caching, generating a constrained label; (d) vLLM scoring
through prompt_logprobs. (b) and (d) run at 2,700 tokens. A cell that would take more than 3 minutes is timed on fewer queries and
labels and scaled by their number, marked `extrapolated`. (b) and (c), (d) run in environments of their own (see
`--lm-eval-python` and `--vllm-python`); one that is absent is named as absent. The result holds, in this order: agreement with
the peers, figures, cells, the limit, memory, machine. How often bf16 gives another best label than full prompts do is what
benchmarks/agreement.py measures.

The limit counts multiplications and additions: 2 · weights · tokens + 4 · layers · H · D · (tokens · P + pairs) + 2 · hidden ·
V · logits, where tokens are those of queries and label trie nodes, pairs the (token, token of its own branch that it sees) ones,
and logits the tokens whose next-token distribution is needed; divided by the bf16 rate of the model's own linear layers, measured
in this run.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine, linear_shapes, measure_matrix_rate
from memory import high_water_mark, reset_high_water_mark

from manyicl.branching import query_branch
from manyicl.encoding import Encoder
from manyicl.label_search import find_best_labels
from manyicl.label_trie import build_trie
from manyicl.modeling import LoadedModel, export_model, load_model
from manyicl.prefix import Prefix, prefill
from manyicl.prefix_files import PrefixFacts, identify_prefix, load_prefix, save_prefix
from manyicl.scoring import score_labels
from manyicl.tasks.task import Example

FOLDER = Path(__file__).parent
PREFIX_TOKENS = (1_000, 2_700, 7_500)
LABEL_COUNTS = (2, 77, 150)
NUM_QUERIES = 128
PEER_PREFIX = 2_700
MOST_SECONDS = 180.0
PERSONS = ["clerk", "driver", "teacher", "neighbour", "doctor", "baker", "student", "tenant", "gardener", "pilot", "nurse"]
VERBS = ["order", "open", "close", "move", "cancel", "repair", "refund", "check", "trace", "renew", "report", "replace", "lower"]
THINGS = ["card", "bill", "parcel", "ticket", "account", "loan", "phone", "table", "lease", "boiler", "passport", "contract"]
PLACES = ["at home", "in the office", "on the train", "before noon", "after work", "this week", "by letter", "at the counter"]


@dataclass(frozen=True)
class Cell:
    """A prefix and a label set; labels as text and as token ids, and the prefix's examples."""

    prefix_tokens: int
    num_labels: int
    examples: list[Example]
    labels: list[str]
    label_ids: list[tuple[int, ...]]

    @property
    def name(self) -> str:
        return f"{self.prefix_tokens} tokens, {self.num_labels} labels"


def make_example(rng: random.Random, labels: Sequence[str]) -> Example:
    """A request of about a dozen tokens, with a label of the set."""
    verb, thing = rng.choice(VERBS), rng.choice(THINGS)
    text = f"The {rng.choice(PERSONS)} wants to {verb} a {thing} {rng.choice(PLACES)}"
    wanted = f"{verb} {thing}"
    return Example(text, wanted if wanted in labels else labels[(VERBS.index(verb) + THINGS.index(thing)) % len(labels)])


def make_cell(encoder: Encoder, prefix_tokens: int, num_labels: int) -> Cell:
    """Examples that fill a prefix and labels that share their beginnings."""
    pairs = [f"{verb} {thing}" for verb in VERBS for thing in THINGS]
    labels = ["yes", "no"] if num_labels == 2 else pairs[:num_labels]
    rng = random.Random(f"{prefix_tokens} {num_labels}")
    examples: list[Example] = []
    total = 0
    while total < prefix_tokens - 24:
        example = make_example(rng, labels)
        total += encoder.count_example(example.input, example.answer)
        examples.append(example)
    return Cell(prefix_tokens, num_labels, examples, labels, encoder.encode_labels(labels))


def operations(config: Any, queries: Sequence[tuple[int, ...]], cell: Cell, prefix_tokens: int) -> float:
    """Operations that scoring needs at least; the formula of the module."""
    trie = build_trie(cell.label_ids)
    tokens = sum(len(query) + len(trie.tokens) for query in queries)
    pairs = sum(int(query_branch(query, trie).visible.sum()) for query in queries)
    logits = len(queries) * (1 + len(trie.tokens))
    shapes = linear_shapes(config)
    weights = config.num_hidden_layers * sum(wide * narrow for wide, narrow in shapes)
    attention = 4 * config.num_hidden_layers * shapes[0][1] * (tokens * prefix_tokens + pairs)
    return float(2 * weights * tokens + attention + 2 * config.hidden_size * config.vocab_size * logits)


def timed(function: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Median seconds of several runs, and the last result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def run_ours(loaded: LoadedModel, cell: Cell, prefix: Prefix, queries: list[tuple[int, ...]]) -> tuple[dict[str, Any], Any]:
    """Full scores of every query, and the search for the best label where there are many."""
    model, labels = loaded.model, cell.label_ids
    score_labels(model, prefix, queries[:4], [labels] * 4)
    repeats = 5 if cell.num_labels == 2 else 1
    seconds, scores = timed(lambda: score_labels(model, prefix, queries, [labels] * len(queries)), repeats)
    result = {"queries": len(queries), "seconds": seconds, "queries_per_second": len(queries) / seconds}
    if cell.num_labels > 2:
        search, best = timed(lambda: find_best_labels(model, prefix, queries, [labels] * len(queries)))
        found = [own.index for own in best]
        result["best_label_search"] = {
            "seconds": search,
            "queries_per_second": len(queries) / search,
            "mean_nodes": float(np.mean([own.num_nodes for own in best])),
            "trie_nodes": len(build_trie(labels).tokens),
            "same_label_as_full_scoring": float(np.mean([int(own.argmax()) for own in scores] == np.array(found))),
        }
    return result, np.array(scores)


@torch.inference_mode()
def score_with_full_prompts(
    loaded: LoadedModel, prefix_ids: Sequence[int], queries: Sequence[tuple[int, ...]], labels: Sequence[tuple[int, ...]]
) -> np.ndarray:
    """Peer (a): transformers, one prompt a query and label, logits of the label's tokens only."""
    scores = np.zeros((len(queries), len(labels)))
    for line, query in enumerate(queries):
        for column, label in enumerate(labels):
            ids = torch.tensor([[*prefix_ids, *query, *label]])
            logits = loaded.model(input_ids=ids, use_cache=False, logits_to_keep=len(label) + 1).logits[0, :-1].float()
            scores[line, column] = float(logits.log_softmax(-1)[torch.arange(len(label)), torch.tensor(label)].sum())
    return scores


def time_full_prompts(
    loaded: LoadedModel, cell: Cell, prefix_ids: Sequence[int], queries: Sequence[tuple[int, ...]], reference: np.ndarray
) -> dict[str, Any]:
    """Peer (a)'s cell: the whole cell where it fits 3 minutes, else two labels and as many queries as 15 seconds hold."""
    ids = list(prefix_ids)
    one, _ = timed(lambda: score_with_full_prompts(loaded, ids, queries[:1], cell.label_ids[:1]))
    if one * len(queries) * cell.num_labels <= MOST_SECONDS:
        few, labels = list(queries), cell.label_ids
    else:
        few, labels = list(queries[: max(1, int(MOST_SECONDS / 12 / one / 2))]), cell.label_ids[:2]
    seconds, found = timed(lambda: score_with_full_prompts(loaded, ids, few, labels))
    print(f"transformers, {cell.name}: {len(few)} queries, {len(labels)} labels, {seconds:.1f} s", file=sys.stderr)
    return peer_cell(seconds, (len(few), len(labels)), cell, reference, found)


def peer_cell(seconds: float, done: tuple[int, int], cell: Cell, reference: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Figures of a peer that scored `done` = (queries, labels), scaled to all labels, and its agreement with ours."""
    num_queries, num_labels = done
    ours = reference[:num_queries, :num_labels]
    per_query = seconds / num_queries * cell.num_labels / num_labels
    return {
        "queries": num_queries,
        "labels": num_labels,
        "seconds": seconds,
        "queries_per_second": 1 / per_query,
        "extrapolated": num_queries < NUM_QUERIES or num_labels < cell.num_labels,
        "agreement": {
            "largest_difference": float(np.abs(scores - ours).max()),
            "same_best_label": float(np.mean(scores.argmax(1) == ours.argmax(1))),
        },
    }


def run_outside(python: Path, script: str, job: dict[str, Any], folder: Path) -> Any:
    """What a peer's script in its own environment answers, or why there is no answer."""
    if not python.exists():
        return {"absent": f"{python} does not exist"}
    given, answer = folder / f"{script}.job.json", folder / f"{script}.answer.json"
    given.write_text(json.dumps(job), encoding="utf-8")
    command = [str(python), str(FOLDER / script), str(given), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        return {"absent": f"{script} failed with code {done.returncode}: {done.stderr.strip()[-800:]}"}
    return json.loads(answer.read_text(encoding="utf-8"))


def measure_memory(threads: int) -> dict[str, Any]:
    """Peak memory beyond the loaded model, in a fresh process. Mapped weights are read once first: they count as loaded."""
    torch.set_num_threads(threads)
    loaded = load_model("default")
    encoder = Encoder(loaded.tokenizer)
    cell = make_cell(encoder, 7_500, 2)
    queries = make_queries(encoder)
    for weight in loaded.model.parameters():
        weight.sum()
    start = reset_high_water_mark()
    prefix = prefill(loaded.model, encoder, cell.examples)
    prefilled = high_water_mark()
    reset_high_water_mark()
    score_labels(loaded.model, prefix, queries, [cell.label_ids] * len(queries))
    scored = high_water_mark()
    return {
        "loaded_bytes": start,
        "prefix_bytes": prefix.num_bytes,
        "prefix_tokens": prefix.num_tokens,
        "prefill_beyond_model_bytes": prefilled - start,
        "scoring_beyond_model_bytes": scored - start,
        "peak_beyond_model_and_prefix_bytes": max(prefilled, scored) - start - prefix.num_bytes,
    }


def make_queries(encoder: Encoder, name: str = "queries") -> list[tuple[int, ...]]:
    rng = random.Random(name)
    return [encoder.encode_query(make_example(rng, ["yes", "no"]).input) for _ in range(NUM_QUERIES)]


def measure_saved_prefix(loaded: LoadedModel, encoder: Encoder, cell: Cell, folder: Path) -> dict[str, Any]:
    """Opening and verifying a saved prefix against prefilling it."""
    prefilling, prefix = timed(lambda: prefill(loaded.model, encoder, cell.examples))
    identity = identify_prefix(loaded.model, loaded.fingerprint, encoder)
    save_prefix(prefix, PrefixFacts(identity=identity), folder)
    opening, (opened, _) = timed(lambda: load_prefix(folder, identity), 5)
    same = all(
        torch.equal(mine, theirs)
        for ours, saved in zip(prefix.states, opened.states, strict=True)
        for mine, theirs in zip(ours, saved, strict=True)
    )
    return {
        "tokens": prefix.num_tokens,
        "prefill_seconds": prefilling,
        "open_seconds": opening,
        "times_faster": prefilling / opening,
        "same": same,
    }


def run_vllm(python: Path, job: dict[str, Any], folder: Path) -> Any:
    """vLLM's answer with the model compiled and eager, the faster of the two in each cell."""
    eager = run_outside(python, "peer_vllm.py", job | {"eager": True}, folder)
    cells = [cell | {"scored": []} for cell in job["cells"]]
    compiled = run_outside(python, "peer_vllm.py", job | {"eager": False, "cells": cells}, folder)
    for name, own in compiled.get("picks", {}).items() if "absent" not in eager else ():
        if own["seconds"] < eager["picks"][name]["seconds"]:
            eager["picks"][name] = own | {"compiled": True}
    return eager


def pick_cell(own: dict[str, Any], scores: np.ndarray) -> dict[str, Any]:
    """What vLLM's constrained choices took in a cell, and how often they are the best label of our `scores` [queries, labels]."""
    count = len(own["picks"])
    best = scores[:count].argmax(1)
    return {
        "queries": count,
        "seconds": own["seconds"],
        "seconds_of_each_run": own["seconds_of_each_run"],
        "compiled": own.get("compiled", False),
        "tokens_outside_blocks": own["tokens_outside_blocks"],
        "queries_per_second_on_whole_blocks": count / own["seconds_on_whole_blocks"],
        "queries_per_second": count / own["seconds"],
        "extrapolated": False,
        "agreement": {"same_best_label": float(np.mean(best == np.array(own["picks"])))},
    }


def run_peers(
    arguments: argparse.Namespace,
    loaded: LoadedModel,
    encoder: Encoder,
    cells: list[Cell],
    prefixes: dict[str, Prefix],
    queries: list[tuple[int, ...]],
    scores: dict[str, np.ndarray],
) -> dict[str, dict[str, Any]]:
    """Every peer's cells, by peer and cell name."""
    results: dict[str, dict[str, Any]] = {"transformers": {}, "lm_eval": {}, "vllm_pick": {}, "vllm_scores": {}}
    # The implementation that transformers takes by itself; ours would otherwise answer for it.
    loaded.model.set_attn_implementation("sdpa")
    for cell in cells:
        results["transformers"][cell.name] = time_full_prompts(
            loaded, cell, prefixes[cell.name].token_ids, queries, scores[cell.name]
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_model("default", folder / "model")
        jobs = [
            {
                "name": cell.name,
                "prefix": prefixes[cell.name].token_ids,
                "queries": queries,
                "more_queries": make_queries(encoder, "more queries"),
                "labels": cell.label_ids,
                "texts": [f" {label}" for label in cell.labels],
                "scored": [1, 2] if arguments.smallest or (cell.prefix_tokens == PEER_PREFIX and cell.num_labels < 150) else [],
            }
            for cell in cells
        ]
        common = {"model": str(folder / "model"), "threads": arguments.threads, "terminator": loaded.tokenizer.eos_token_id}
        harness = run_outside(
            arguments.lm_eval_python, "peer_lm_eval.py", common | {"cells": [job for job in jobs if job["scored"]]}, folder
        )
        vllm = run_vllm(arguments.vllm_python, common | {"cells": jobs}, folder)
    if "absent" in harness:
        results["lm_eval"] = harness
    if "absent" in vllm:
        results["vllm_pick"] = results["vllm_scores"] = vllm
    for cell in cells:
        for peer, answer in (("lm_eval", harness), ("vllm_scores", vllm)):
            own = answer.get("scores", {}).get(cell.name)
            if own:
                found = np.array(own["scores"])
                results[peer][cell.name] = peer_cell(own["seconds"], found.shape, cell, scores[cell.name], found)
        own = vllm.get("picks", {}).get(cell.name)
        if own:
            results["vllm_pick"][cell.name] = pick_cell(own, scores[cell.name])
    return results


def compare(ours: dict[str, Any], peers: dict[str, Any], saved: dict[str, Any], memory: dict[str, Any]) -> dict[str, Any]:
    """The figures that the project states, each None where its peer is absent."""

    def times(peer: str, cell: str) -> float | None:
        other = peers[peer].get(cell)
        return (
            ours[cell]["queries_per_second"] / other["queries_per_second"] if isinstance(other, dict) and cell in ours else None
        )

    small, middle, large = "2700 tokens, 2 labels", "2700 tokens, 77 labels", "7500 tokens, 2 labels"
    return {
        "times vLLM constrained, " + small: times("vllm_pick", small),
        "times vLLM constrained, the same with a prefix of whole blocks": _times_whole_blocks(ours, peers, small),
        "times HFLM, " + middle: times("lm_eval", middle),
        "times vLLM prompt_logprobs, " + middle: times("vllm_scores", middle),
        "times transformers, " + middle: times("transformers", middle),
        "share of the limit, " + small: ours.get(small, {}).get("share_of_limit"),
        "share of the limit, " + large: ours.get(large, {}).get("share_of_limit"),
        "saved prefix opened, times faster than prefilled": saved.get("times_faster"),
        "peak memory beyond model and prefix, MB": memory["peak_beyond_model_and_prefix_bytes"] / 1e6 if memory else None,
    }


def _times_whole_blocks(ours: dict[str, Any], peers: dict[str, Any], cell: str) -> float | None:
    """Ours over vLLM where the prefix ends with a block, which suits vLLM best."""
    other = peers["vllm_pick"].get(cell)
    if not isinstance(other, dict) or cell not in ours:
        return None
    return float(ours[cell]["queries_per_second"] / other["queries_per_second_on_whole_blocks"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON; printed too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smallest", action="store_true", help="one cell (1,000 tokens, 2 labels), to see that it works")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--vllm-python", type=Path, default=Path(".venv-vllm/bin/python"), help="make vllm-env makes it")
    parser.add_argument("--lm-eval-python", type=Path, default=Path(sys.executable), help="a Python with lm-eval and manyicl")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.memory:
        print(json.dumps(measure_memory(arguments.threads)))
        return
    start = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    memory: dict[str, Any] = {}
    if not arguments.smallest:
        command = [sys.executable, __file__, "--memory", "--threads", str(arguments.threads)]
        memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    loaded = load_model("default", dtype="bfloat16")
    config, encoder = loaded.model.config, Encoder(loaded.tokenizer)
    rate = measure_matrix_rate(config)
    shapes = [(1_000, 2)] if arguments.smallest else [(tokens, labels) for tokens in PREFIX_TOKENS for labels in LABEL_COUNTS]
    cells = [make_cell(encoder, *shape) for shape in shapes]
    queries = make_queries(encoder)
    prefixes: dict[str, Prefix] = {}
    ours, scores = {}, {}
    for cell in cells:
        prefixes[cell.name] = prefix = prefill(loaded.model, encoder, cell.examples)
        ours[cell.name], scores[cell.name] = run_ours(loaded, cell, prefix, queries)
        needed = operations(config, queries, cell, prefix.num_tokens)
        ours[cell.name] |= {"prefix_tokens": prefix.num_tokens, "operations": needed, "limit_seconds": needed / rate}
        ours[cell.name]["share_of_limit"] = needed / rate / ours[cell.name]["seconds"]
        prefixes[cell.name] = Prefix(prefix.token_ids, prefix.stops, ())
        print(f"ours, {cell.name}: {ours[cell.name]['seconds']:.1f} s", file=sys.stderr)
    saved = {}
    if not arguments.smallest:
        with tempfile.TemporaryDirectory() as temporary:
            saved = measure_saved_prefix(loaded, encoder, cells[-3], Path(temporary) / "prefix")
    peers = {} if arguments.no_peers else run_peers(arguments, loaded, encoder, cells, prefixes, queries, scores)
    result = {
        "agreement": {
            peer: {name: cell["agreement"] for name, cell in found.items() if isinstance(cell, dict)}
            for peer, found in peers.items()
        },
        "figures": compare(ours, peers, saved, memory) if peers else {},
        "ours": ours,
        "peers": peers,
        "saved_prefix": saved,
        "memory": memory,
        "limit": {"matrix_rate_per_second": rate, "formula": __doc__.split("\n\n")[2].strip()},
        "seconds": time.perf_counter() - start,
        "query_tokens": statistics.mean(map(len, queries)),
        "machine": describe_machine(),
        "model": f"default, bf16, {loaded.note}",
    }
    text = json.dumps(result, indent=2)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
