"""A row is what the model is fed: build one from the built-in tasks and print it token by token.

Shows that every answer and its terminator are targets, that nothing else is, and that the same index gives the same row again.
Costs a few seconds and no model weights: only the default model's tokenizer is loaded. The first use of the default model
converts it once, which takes longer.
"""

from manyicl.config import EpisodesConfig
from manyicl.encoding import Encoder
from manyicl.inspection import print_row
from manyicl.modeling import load_tokenizer
from manyicl.packing import build_row, collate
from manyicl.tasks.readers import load_suite


def main() -> None:
    tasks = load_suite("builtin").select("meta_training")
    tokenizer = load_tokenizer("default")
    encoder = Encoder(tokenizer)
    config = EpisodesConfig.model_validate({"max_tokens": 256})

    row = build_row(tasks, config=config, encoder=encoder, seed=0, index=0)
    print_row(row, tokenizer)

    shots = collate([row])["shot"][0]
    print("\nfirst 40 tokens; * marks a target, with its number of shots")
    for token, shot in list(zip(row.sequences[0].token_ids, shots.tolist(), strict=True))[:40]:
        print(f"{tokenizer.decode([token])!r:20} {'* ' + str(shot) if shot >= 0 else ''}")

    again = build_row(tasks, config=config, encoder=encoder, seed=0, index=0)
    print("the same row again:", again == row)


if __name__ == "__main__":
    main()
