"""Forecasts of training against measurement on this machine: python benchmarks/planning.py --output FILE

The default model, rows of made-up text (benchmarks/training.py), LoRA on all linear layers unless a configuration says other.
Each configuration is forecast from its recipe, as `manyicl plan` does, and then trained for three updates in each of two fresh
processes, whose heaps do not grow alike:

    memory    peak beyond the loaded model (the high-water mark is reset after loading), the higher of the two, against the
              forecast's peak less the model
    time      median seconds of the updates after the first, of both, against the forecast's seconds of an update

Each forecast measures the rates itself, right before the training that it is compared with. `--only NAME` runs some of the
configurations. Nothing else may run meanwhile; takes six minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import describe_machine
from memory import high_water_mark, reset_high_water_mark

FOLDER = Path(__file__).parent
NUM_UPDATES = 3
NUM_PROCESSES = 2
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "1,024 tokens": {"max_tokens": 1_024},
    "2,048 tokens": {"max_tokens": 2_048},
    "4,096 tokens": {"max_tokens": 4_096},
    "2,048 tokens, rank 64": {"max_tokens": 2_048, "lora": {"rank": 64}},
    "1,024 tokens, rank 8, queries and values": {"max_tokens": 1_024, "lora": {"rank": 8, "targets": ["q_proj", "v_proj"]}},
    "4,096 tokens, checkpointing": {"max_tokens": 4_096, "gradient_checkpointing": True},
    "1,024 tokens, two rows a pass": {"max_tokens": 1_024, "rows_per_device": 2, "rows_per_step": 2},
    "1,024 tokens, two passes": {"max_tokens": 1_024, "rows_per_step": 2},
    "1,024 tokens, all weights": {"max_tokens": 1_024, "tune": "full"},
}
MOST_MEMORY_ERROR, MOST_TIME_ERROR = 0.15, 0.25


def make_recipe(configuration: dict[str, Any]) -> Any:
    """The recipe of a configuration."""
    from manyicl.config import parse_recipe

    training = {name: value for name, value in configuration.items() if name != "max_tokens"}
    fixed = {"num_steps": NUM_UPDATES, "dtype": "bfloat16", "schedule": "constant", "warmup_ratio": 0.0, "save_every": 1_000_000}
    return parse_recipe({"episodes": {"max_tokens": configuration["max_tokens"]}, "training": fixed | training})


def measure(configuration: dict[str, Any], threads: int) -> dict[str, Any]:
    """Seconds of each update and peak memory beyond the loaded model, in this process."""
    import torch
    from training import make_rows
    from updates import UpdateTimer

    from manyicl.arguments import training_arguments
    from manyicl.modeling import add_lora, load_model
    from manyicl.training import ManyShotTrainer, prepare_for_training, to_tensors

    torch.set_num_threads(threads)
    recipe = make_recipe(configuration)
    training = recipe.training
    rows = make_rows(recipe.episodes.max_tokens, NUM_UPDATES * training.rows_per_step)
    loaded = load_model(recipe.model, dtype="float32" if training.tune == "full" else training.dtype)
    for weight in loaded.model.parameters():  # Mapped weights are read once, so that they count as loaded.
        weight.detach().sum()
    loaded_bytes = reset_high_water_mark()
    model = loaded.model if training.tune == "full" else add_lora(loaded.model, training.lora, seed=recipe.seed)
    prepare_for_training(model)
    timer = UpdateTimer()
    with tempfile.TemporaryDirectory() as temporary:
        trainer = ManyShotTrainer(
            objective=recipe.objective,
            model=model,
            args=training_arguments(training, Path(temporary), seed=0, validate=False),
            train_dataset=rows,
            data_collator=to_tensors,
            callbacks=[timer],
        )
        trainer.args.save_strategy = "no"
        trainer.train()
    targets = sum(shot >= 0 for row in rows for sequence in row.sequences for shot in sequence.shots)
    return {
        "tokens": [row.num_tokens for row in rows],
        "target_share": targets / sum(row.num_tokens for row in rows),
        "seconds": timer.seconds,
        "loaded_bytes": loaded_bytes,
        "peak_beyond_model_bytes": high_water_mark() - loaded_bytes,
    }


def compare(plan: Any, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Forecast and measurements of one configuration, with the error of each: forecast over measured, less one."""
    memory = plan.peak_bytes - plan.job.loaded_bytes
    seconds = statistics.median(second for each in found for second in each["seconds"][1:])
    measured = max(each["peak_beyond_model_bytes"] for each in found)
    return {
        "predicted_bytes": memory,
        "measured_bytes": measured,
        "memory_error": memory / measured - 1,
        "matrix_rate_per_second": plan.device.matrix_rate,
        "memory_rate_per_second": plan.device.memory_rate,
        "predicted_seconds": plan.seconds_per_update,
        "measured_seconds": seconds,
        "time_error": plan.seconds_per_update / seconds - 1,
        "measured": found,
    }


def run_measurement(configuration: dict[str, Any], threads: int) -> dict[str, Any]:
    """What a fresh process measures of a configuration."""
    command = [sys.executable, str(FOLDER / "planning.py"), "--measure", json.dumps(configuration), "--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{configuration}: {done.stderr.strip()[-1000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Forecast and measure every configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON; printed too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", action="append", choices=list(CONFIGURATIONS), help="a configuration; may be given again")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure, arguments.threads)))
        return
    import torch

    from manyicl.training_plan import PlanRequest, plan_recipe

    torch.set_num_threads(arguments.threads)
    cells = {}
    for name in arguments.only or CONFIGURATIONS:
        plan = plan_recipe(make_recipe(CONFIGURATIONS[name]), PlanRequest())
        found = [run_measurement(CONFIGURATIONS[name], arguments.threads) for _ in range(NUM_PROCESSES)]
        cells[name] = compare(plan, found)
        print(f"{name}: memory {cells[name]['memory_error']:+.1%}, time {cells[name]['time_error']:+.1%}", file=sys.stderr)
    result = {
        "configurations": cells,
        "within": {
            "memory": all(abs(cell["memory_error"]) <= MOST_MEMORY_ERROR for cell in cells.values()),
            "time": all(abs(cell["time_error"]) <= MOST_TIME_ERROR for cell in cells.values()),
        },
        "machine": describe_machine(),
    }
    text = json.dumps(result, indent=2)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
