"""One process = two processes: the same recipe under torchrun (gloo) sees the same rows, losses and weights.

Tolerance in fp32: 1e-5 on losses, and 1e-4 on weights after four updates of AdamW at rate 0.01, which enlarges rounding where
a gradient is small. Gradients are summed in another order.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from manyicl.checkpoints import is_whole, list_checkpoints
from model_fixtures import largest_difference, make_recipe, write_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Notes every row that the model is fed, and by which process; the second process is late with its part of a checkpoint.
DRIVER = """
import os, sys, time
from manyicl import training
from manyicl.cli import main

step = training.ManyShotTrainer.training_step
def noted(trainer, model, inputs, *arguments, **options):
    tokens = "".join(map(str, inputs["input_ids"].flatten().tolist()))
    with open(os.environ["NOTES"] + os.environ.get("RANK", "0"), "a") as notes:
        notes.write(f"{trainer.state.global_step} {tokens}\\n")
    return step(trainer, model, inputs, *arguments, **options)
training.ManyShotTrainer.training_step = noted

save = training.Trainer._save_rng_state
def save_late(trainer, folder):
    time.sleep(0.5 * trainer.args.process_index)
    save(trainer, folder)
training.Trainer._save_rng_state = save_late
sys.argv[0] = "manyicl"
main()
"""


@pytest.fixture
def start(tmp_path):
    """Runs the driver with so many processes; gives the exit code and what was printed."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)

    def run(num_processes, *arguments, notes="notes"):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "NOTES": str(tmp_path / f"{notes}-{num_processes}-")}
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
        done = subprocess.run(
            [sys.executable, *(torchrun if num_processes > 1 else []), str(driver), *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def fed_rows(tmp_path: Path, num_processes: int, notes: str = "notes") -> list[list[tuple[str, str]]]:
    """Per process: (update, row) as it was fed."""
    return [
        [tuple(line.split()) for line in (tmp_path / f"{notes}-{num_processes}-{rank}").read_text().splitlines()]
        for rank in range(num_processes)
    ]


def test_two_processes_are_one_and_resume_as_one(start, tiny_model_folder, suite_folder, tmp_path):
    training = {"num_steps": 4, "rows_per_step": 4, "save_every": 2, "validate_checkpoints": True, "validation_rows": 2}
    folder = tiny_model_folder("llama")
    recipe = make_recipe(folder, suite_folder(), tmp_path / "run", training=training, objective={"normalisation": "answer"})
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    outputs = {number: tmp_path / f"run-{number}" for number in (1, 2)}
    for number, output in outputs.items():
        code, shown = start(number, "train", path, f"output={output}")
        assert code == 0, shown
        assert shown.count("4 updates, ") == number  # Each process prints the same line.

    (alone,), (first, second) = fed_rows(tmp_path, 1), fed_rows(tmp_path, 2)
    assert len(alone) == 16
    assert len(first) == len(second) == 8
    for update in "0123":
        rows = [row for number, row in alone if number == update]
        shared = [[row for number, row in own if number == update] for own in (first, second)]
        assert (shared[0][0], shared[1][0], shared[0][1], shared[1][1]) == tuple(rows)

    one, two = (json.loads((output / "summary.json").read_text()) for output in outputs.values())
    assert [loss for _, loss in one["losses"]] == pytest.approx([loss for _, loss in two["losses"]], abs=1e-5)
    assert (one["updates"], one["tokens"], one["answers"]) == (two["updates"], two["tokens"], two["answers"])
    weights = [load_file(output / "adapter_model.safetensors") for output in outputs.values()]
    assert largest_difference(*weights) < 1e-4
    logs = []
    for output in outputs.values():
        newest = list_checkpoints(output / "checkpoints")[-1]
        assert is_whole(newest)
        history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
        logs.append([entry[key] for entry in history for key in sorted(entry) if key.startswith(("loss/", "eval_loss"))])
    assert len(logs[0]) > 8
    assert logs[0] == pytest.approx(logs[1], abs=2e-4)  # Rounded to four places.
    manifest = json.loads((list_checkpoints(outputs[2] / "checkpoints")[-1] / "manifest.json").read_text())
    assert {name for name in manifest if name.startswith("rng_state")} == {"rng_state_0.pth", "rng_state_1.pth"}

    # Resumed from the first checkpoint, both processes go on with the rows that are left, to the last bit.
    summary, before = two, weights[1]
    for name in ("summary.json", "adapter_config.json", "adapter_model.safetensors", "checkpoints/checkpoint-4/manifest.json"):
        (outputs[2] / name).unlink()
    code, shown = start(2, "train", path, f"output={outputs[2]}", "--resume", notes="resumed")
    assert code == 0, shown
    assert [[number for number, _ in own] for own in fed_rows(tmp_path, 2, "resumed")] == [["2", "2", "3", "3"]] * 2
    assert largest_difference(before, load_file(outputs[2] / "adapter_model.safetensors")) == 0.0
    resumed = json.loads((outputs[2] / "summary.json").read_text())
    assert (resumed["tokens"], resumed["answers"], resumed["losses"]) == (
        summary["tokens"],
        summary["answers"],
        summary["losses"],
    )
