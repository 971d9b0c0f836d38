"""A finished run's speed and memory against the machine's limit: python benchmarks/training_run.py runs/real

Reads the run's summary, rebuilds its rows to count tokens and targets exactly, measures the matrix-product rate now, on this
machine, and prints JSON. The run itself is not repeated: its seconds are those of its own updates.
"""

import argparse
import json
from pathlib import Path

from machine import describe_machine, measure_matrix_rate, training_operations
from transformers import AutoConfig

from manyicl.config import load_recipe
from manyicl.default_model import default_model_folder
from manyicl.encoding import Encoder
from manyicl.modeling import load_tokenizer
from manyicl.packing import RowDataset
from manyicl.tasks.readers import load_suite


def main() -> None:
    """Print the figures of a run as JSON, and write them beside its summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    recipe = load_recipe(run / "recipe.yaml")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    suite = load_suite(recipe.tasks)
    names = suite.meta_training if recipe.meta_training is None else recipe.meta_training
    rows = list(
        RowDataset(
            [suite.tasks[name] for name in names],
            config=recipe.episodes,
            encoder=Encoder(load_tokenizer(recipe.model), format=recipe.episodes.format),
            seed=recipe.seed,
            num_rows=summary["updates"] * recipe.training.rows_per_step,
        )
    )
    tokens = [row.num_tokens for row in rows]
    targets = sum(sum(shot >= 0 for shot in sequence.shots) for row in rows for sequence in row.sequences)
    config = AutoConfig.from_pretrained(default_model_folder() if recipe.model == "default" else recipe.model)
    rank = recipe.training.lora.rank if recipe.training.tune == "lora" else None
    operations = training_operations(config, tokens, targets=targets, lora_rank=rank)
    rate = measure_matrix_rate(config)
    figures = {
        "run": str(run),
        "updates": summary["updates"],
        "tokens": sum(tokens),
        "targets": targets,
        "answers": summary["answers"],
        "seconds": summary["seconds"],
        "tokens_per_second": sum(tokens) / summary["seconds"],
        "answers_per_second": summary["answers"] / summary["seconds"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "operations": operations,
        "matrix_rate_per_second": rate,
        "limit_tokens_per_second": sum(tokens) * rate / operations,
        "share_of_limit": operations / rate / summary["seconds"],
        "machine": describe_machine(),
    }
    (run / "speed.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
