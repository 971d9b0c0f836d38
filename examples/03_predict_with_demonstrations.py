"""Predict without tuning: labelled examples in the context, queries answered after them.

Shows how the default model's answers to ten queries of a held-out built-in task change from 0 to 32 demonstrations, which are
prefilled once and cut, and what `predict` does in one line.
Costs under a minute on two cores, after the default model's first conversion.
"""

from manyicl import Encoder, load_model, load_suite, predict, prefill, score_labels

NUM_QUERIES = 10


def main() -> None:
    suite = load_suite("builtin")
    task = next(task for task in suite.select("held_out") if task.labels)
    queries = task.test[:NUM_QUERIES]
    loaded = load_model("default")
    print(f"{task.name}: {len(task.labels)} labels; model {loaded.name} ({loaded.note})")

    encoder = Encoder(loaded.tokenizer)
    prefix = prefill(loaded.model, encoder, task.train[:32], instruction=task.instruction)
    labels = encoder.encode_labels(task.labels)
    encoded = [encoder.encode_query(query.input) for query in queries]
    for num_shots in (0, 4, 16, 32):
        scores = score_labels(loaded.model, prefix.trim(num_shots), encoded, [labels] * len(encoded))
        right = sum(task.labels[own.argmax()] == query.answer for own, query in zip(scores, queries, strict=True))
        print(f"{num_shots:3} shots: {right} of {len(queries)} right")

    answers, num_used = predict(loaded, task.train[:64], [query.input for query in queries])
    for query, answer in zip(queries, answers, strict=True):
        print(f"{query.input.splitlines()[-1][:60]!r}: {answer.text} (gold: {query.answer})")
    print(f"from {num_used} demonstrations")


if __name__ == "__main__":
    main()
