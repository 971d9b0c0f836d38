"""How often bf16 scores behind a prefix choose another label than full prompts in bf16.

    python benchmarks/agreement.py --models default runs/demo=tuned --output FILE

The first 40 queries of four built-in tasks (two for validation, two held out), 8 demonstrations, all labels. Two bf16
computations of the same scores round differently, whoever makes them, so a control stands beside ours: transformers' own full
prompts under two of its attention implementations. Both are compared with full prompts under SDPA:

    ours       a prefix, shared-prefix attention, a label trie
    control    full prompts again, under transformers' eager attention
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from scoring import score_with_full_prompts

from manyicl.encoding import Encoder
from manyicl.files import write_json_atomic
from manyicl.modeling import LoadedModel, load_model
from manyicl.prefix import prefill
from manyicl.scoring import score_labels
from manyicl.tasks.readers import load_suite

TASKS = ("opening_hours", "advice_invented_words", "season", "rules")
NUM_SHOTS, NUM_QUERIES = 8, 40


def compare(scores: np.ndarray, full: np.ndarray) -> dict[str, Any]:
    """Scores [queries, labels] against those of full prompts."""
    ordered = np.sort(full, axis=1)
    differing = scores.argmax(1) != full.argmax(1)
    return {
        "same_best_label": float(1 - differing.mean()),
        "mean_difference": float(np.abs(scores - full).mean()),
        "largest_difference": float(np.abs(scores - full).max()),
        "largest_lead_where_labels_differ": float((ordered[:, -1] - ordered[:, -2])[differing].max(initial=0.0)),
    }


def measure_task(loaded: LoadedModel, name: str) -> dict[str, Any]:
    """Ours and the control on every query of a built-in task."""
    encoder, task = Encoder(loaded.tokenizer), load_suite("builtin").tasks[name]
    prefix = prefill(loaded.model, encoder, task.train[:NUM_SHOTS], instruction=task.instruction)
    queries, labels = [encoder.encode_query(query.input) for query in task.test[:NUM_QUERIES]], encoder.encode_labels(task.labels)
    ours = np.array(score_labels(loaded.model, prefix, queries, [labels] * len(queries)))
    loaded.model.set_attn_implementation("sdpa")
    full = score_with_full_prompts(loaded, prefix.token_ids, queries, labels)
    loaded.model.set_attn_implementation("eager")
    control = score_with_full_prompts(loaded, prefix.token_ids, queries, labels)
    counts = {"prefix_tokens": prefix.num_tokens, "labels": len(labels), "queries": len(queries)}
    return counts | {"ours": compare(ours, full), "control": compare(control, full)}


def main() -> None:
    """Measure every model on every task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["default"], help="names of models, or name=shown")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start, models = time.perf_counter(), {}
    for given in arguments.models:
        name, _, shown = given.partition("=")
        loaded = load_model(name, dtype="bfloat16")
        tasks = models[shown or name] = {}
        for task in TASKS:
            tasks[task] = measure_task(loaded, task)
            print(shown or name, task, json.dumps(tasks[task]), file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    write_json_atomic(arguments.output, {"models": models, "shots": NUM_SHOTS, "seconds": seconds, "machine": describe_machine()})


if __name__ == "__main__":
    main()
