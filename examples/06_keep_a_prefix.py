"""Keep a prefix: save it, open it in milliseconds, halve its memory, and share a store of prefixes between processes.

Shows what prefilling 60 demonstrations takes against opening them again, that both give the same scores, that a prefix of another
format is refused, what int8 changes, and how a store of limited size forgets what was used longest ago.
Costs under a minute on two cores, after the default model's first conversion.
"""

import tempfile
import time
from pathlib import Path

import numpy as np

from manyicl import Encoder, extend, load_model, load_suite, prefill, score_labels
from manyicl.errors import PrefixError
from manyicl.planning import prefix_bytes, show_bytes
from manyicl.prefix import quantise
from manyicl.prefix_files import PrefixFacts, identify_prefix, load_prefix, save_prefix
from manyicl.prefix_store import PrefixStore, prefix_key

NUM_DEMONSTRATIONS = 60
NUM_QUERIES = 20


def main() -> None:
    loaded = load_model("default")
    encoder = Encoder(loaded.tokenizer)
    task = next(task for task in load_suite("builtin").select("validation") if task.labels)
    demonstrations = task.train[:NUM_DEMONSTRATIONS]
    queries = [encoder.encode_query(query.input) for query in task.test[:NUM_QUERIES]]
    labels = [encoder.encode_labels(task.labels)] * NUM_QUERIES

    start = time.perf_counter()
    prefix = prefill(loaded.model, encoder, demonstrations, instruction=task.instruction)
    prefill_seconds = time.perf_counter() - start
    forecast = prefix_bytes(loaded.model.config, prefix.num_tokens, loaded.model.dtype)
    print(f"{task.name}: {prefix.num_shots} demonstrations, {prefix.num_tokens} tokens, {show_bytes(forecast)} as forecast")

    identity = identify_prefix(loaded.model, loaded.fingerprint, encoder)
    facts = PrefixFacts(identity=identity, instruction=task.instruction, labels=task.labels)
    plain_scores = np.stack(score_labels(loaded.model, prefix, queries, labels))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / task.name
        save_prefix(prefix, facts, folder)
        start = time.perf_counter()
        opened, found = load_prefix(folder, identity)
        open_seconds = time.perf_counter() - start
        print(f"prefilled in {prefill_seconds:.2f} s, opened and verified in {1000 * open_seconds:.1f} ms; labels {found.labels}")
        same = np.array_equal(plain_scores, np.stack(score_labels(loaded.model, opened, queries, labels)))
        print(f"the opened prefix gives the same scores: {same}")
        longer = extend(loaded.model, encoder, opened, task.train[NUM_DEMONSTRATIONS : NUM_DEMONSTRATIONS + 2])
        print(
            f"extended to {longer.num_shots} demonstrations, cut to {longer.trim(10).num_shots}; only the new ones were computed"
        )

        chat = identify_prefix(loaded.model, loaded.fingerprint, Encoder(loaded.tokenizer, format="chat"))
        try:
            load_prefix(folder, chat)
        except PrefixError as error:
            print(f"refused: {str(error).replace(name, '')[:100]}…")

        small = quantise(prefix)
        scores = np.stack(score_labels(loaded.model, small, queries, labels))
        change = np.abs(scores - plain_scores)
        agreement = (scores.argmax(axis=1) == plain_scores.argmax(axis=1)).mean()
        print(
            f"int8: {show_bytes(small.num_bytes)} instead of {show_bytes(prefix.num_bytes)}; log-probabilities change by", end=" "
        )
        print(f"{change.mean():.3f} on average and {change.max():.3f} at most; {agreement:.0%} of the answers stay")

        store = PrefixStore(Path(name) / "store", max_bytes=2 * prefix.num_bytes)
        for num_shots in (20, 40, 60):
            store.put(prefix.trim(num_shots), facts)
        for num_shots in (20, 40, 60):
            kept = store.get(prefix_key(facts, prefix.trim(num_shots).token_ids))
            print(f"store of {show_bytes(store.max_bytes)}: {num_shots} shots {'found' if kept else 'forgotten'}")


if __name__ == "__main__":
    main()
