"""One process = two processes: the same recipe under torchrun (gloo) sees the same rows, losses and weights, and so does one
that goes on with another number of processes; an evaluation by several gives the records of one.

Tolerance in fp32: 1e-5 on losses, and 1e-4 on weights after four updates of AdamW at rate 0.01, which enlarges rounding where
a gradient is small. Gradients are summed in another order. With the same number of processes nothing differs, to the last bit.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from manyicl.checkpoints import is_whole, list_checkpoints
from manyicl.files import hash_file
from manyicl.records import read_records
from manyicl.runs import EvaluationRequest, evaluate_models
from model_fixtures import largest_difference, make_recipe, write_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WEIGHTS = "adapter_model.safetensors"
# Notes every row that the model is fed and every cell that is computed, and by which process; the second process is late with
# its part of a checkpoint. KILL names a process, a place and a count, at which it is killed.
DRIVER = """
import os, signal, sys, time
from manyicl import evaluation, training
from manyicl.cli import main

rank = os.environ.get("RANK", "0")
killed, place, count = os.environ.get("KILL", "none nowhere 0").split()

def die_if_due(here, number):
    if (rank, here, number) == (killed, place, int(count)):
        os.kill(os.getpid(), signal.SIGKILL)

def note(text):
    with open(os.environ["NOTES"] + rank, "a") as notes:
        notes.write(text + "\\n")

step = training.ManyShotTrainer.training_step
def noted(trainer, model, inputs, *arguments, **options):
    die_if_due("update", trainer.state.global_step)
    tokens = "".join(map(str, inputs["input_ids"].flatten().tolist()))
    note(f"{trainer.state.global_step} {tokens}")
    return step(trainer, model, inputs, *arguments, **options)
training.ManyShotTrainer.training_step = noted

save = training.Trainer._save_rng_state
def save_late(trainer, folder):
    time.sleep(0.5 * trainer.args.process_index)
    die_if_due("checkpoint", trainer.state.global_step)
    save(trainer, folder)
training.Trainer._save_rng_state = save_late

cells = []
evaluate_cell = evaluation._evaluate_cell
def noted_cell(method, task, role, *arguments, **options):
    die_if_due("cell", len(cells))
    cells.append(task.name)
    note(f"{options['plan'].model} {task.name} {options['seed']} {options['shots']}")
    return evaluate_cell(method, task, role, *arguments, **options)
evaluation._evaluate_cell = noted_cell
sys.argv[0] = "manyicl"
main()
"""


@pytest.fixture
def driver(tmp_path):
    path = tmp_path / "driver.py"
    path.write_text(DRIVER)
    return path


@pytest.fixture
def start(driver, tmp_path):
    """Runs the driver with so many processes of torchrun; gives the exit code and what was printed."""

    def run(num_processes, *arguments, notes="notes"):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
        done = subprocess.run(
            [sys.executable, *(torchrun if num_processes > 1 else []), str(driver), *map(str, arguments)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "NOTES": f"{tmp_path}/{notes}-{num_processes}-"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def end_all(processes: list[subprocess.Popen], timeout: float) -> tuple[list[int], list[str]]:
    """Exit codes and what was printed, when all have ended; those that have not in time are killed."""
    try:
        shown = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], shown


@pytest.fixture
def start_each(driver, tmp_path):
    """Runs the driver in processes that no launcher looks after, one list of arguments each; exit codes and what was printed."""

    def run(*arguments_of_each, size=None, notes="notes", kill="none nowhere 0", timeout=300):
        port, size = free_port(), size or len(arguments_of_each)
        common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        common |= {"OMP_NUM_THREADS": "1", "NOTES": f"{tmp_path}/{notes}-{size}-", "KILL": kill}
        processes = [
            subprocess.Popen(
                [sys.executable, str(driver), *map(str, arguments)],
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, arguments in enumerate(arguments_of_each)
        ]
        return end_all(processes, timeout)

    return run


@pytest.fixture
def start_machines(driver, tmp_path):
    """Runs the driver under two torchruns that meet each other, as on two machines; exit codes and what was printed."""

    def run(*arguments, meeting):
        port = free_port()
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
                + [part.format(number=number, port=port) for part in meeting]
                + [str(driver), *map(str, arguments)],
                env=os.environ | {"OMP_NUM_THREADS": "1", "NOTES": f"{tmp_path}/notes-2-"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number in (0, 1)
        ]
        return end_all(processes, 300)

    return run


@pytest.fixture
def recipe(tiny_model_folder, suite_folder, tmp_path):
    """The file of a small recipe; its output is given when it is run."""
    training = {"num_steps": 4, "rows_per_step": 4, "save_every": 2, "validate_checkpoints": True, "validation_rows": 2}
    made = make_recipe(
        tiny_model_folder("llama"), suite_folder(), tmp_path / "run", training=training, objective={"normalisation": "answer"}
    )
    return write_recipe(tmp_path / "recipe.yaml", made)


def fed_rows(tmp_path: Path, num_processes: int, notes: str = "notes") -> list[list[tuple[str, str]]]:
    """Per process: (update, row) as it was fed."""
    return [
        [tuple(line.split()) for line in (tmp_path / f"{notes}-{num_processes}-{rank}").read_text().splitlines()]
        for rank in range(num_processes)
    ]


def read_summary(output: Path) -> dict:
    return json.loads((output / "summary.json").read_text())


def undo_end(output: Path) -> None:
    """Take away what a finished run wrote after its first checkpoint; its last one loses a part of one process's file."""
    for name in ("summary.json", "adapter_config.json", WEIGHTS):
        (output / name).unlink()
    cut_short = output / "checkpoints" / "checkpoint-4" / "rng_state_1.pth"
    cut_short.write_bytes(cut_short.read_bytes()[:-100])


def assert_same_counts(first: dict, second: dict) -> None:
    assert [first[name] for name in ("updates", "tokens", "answers")] == [
        second[name] for name in ("updates", "tokens", "answers")
    ]


def test_two_processes_are_one_and_go_on_as_two_or_as_one(start, recipe, tmp_path):
    outputs = {number: tmp_path / f"run-{number}" for number in (1, 2)}
    for number, output in outputs.items():
        code, shown = start(number, "train", recipe, f"output={output}")
        assert code == 0, shown
        assert shown.count("4 updates, ") == 1  # The main process alone says how the run ended.

    (alone,), (first, second) = fed_rows(tmp_path, 1), fed_rows(tmp_path, 2)
    assert len(alone) == 16
    assert len(first) == len(second) == 8
    for update in "0123":
        rows = [row for number, row in alone if number == update]
        shared = [[row for number, row in own if number == update] for own in (first, second)]
        assert (shared[0][0], shared[1][0], shared[0][1], shared[1][1]) == tuple(rows)

    one, two = (read_summary(output) for output in outputs.values())
    assert [loss for _, loss in one["losses"]] == pytest.approx([loss for _, loss in two["losses"]], abs=1e-5)
    assert_same_counts(one, two)
    weights = [load_file(output / WEIGHTS) for output in outputs.values()]
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

    # From the first checkpoint, as the last one is cut short: two processes go on to the last bit, one within rounding.
    undo_end(outputs[2])
    shutil.copytree(outputs[2], tmp_path / "as-one")
    code, shown = start(2, "train", recipe, f"output={outputs[2]}", "--resume", notes="resumed")
    assert code == 0, shown
    assert "checkpoint-4 is not whole" in shown
    assert [[number for number, _ in own] for own in fed_rows(tmp_path, 2, "resumed")] == [["2", "2", "3", "3"]] * 2
    assert largest_difference(weights[1], load_file(outputs[2] / WEIGHTS)) == 0.0
    assert read_summary(outputs[2])["losses"] == two["losses"]
    assert_same_counts(read_summary(outputs[2]), two)

    code, shown = start(1, "train", recipe, f"output={tmp_path / 'as-one'}", "--resume", notes="resumed")
    assert code == 0, shown
    assert "was started with processes 2 and goes on with 1" in shown
    assert fed_rows(tmp_path, 1, "resumed") == [alone[8:]]
    changed = read_summary(tmp_path / "as-one")
    assert [loss for _, loss in changed["losses"]] == pytest.approx([loss for _, loss in one["losses"]], abs=1e-5)
    assert_same_counts(changed, one)
    assert largest_difference(weights[0], load_file(tmp_path / "as-one" / WEIGHTS)) < 1e-4


def test_a_killed_process_stops_the_other_and_resume_ends_where_an_uninterrupted_run_does(start, start_each, recipe, tmp_path):
    whole = tmp_path / "whole"
    code, shown = start(2, "train", recipe, f"output={whole}", notes="whole")
    assert code == 0, shown
    for kill, goes_on_from in (("1 update 3", 2), ("1 checkpoint 2", None), ("0 checkpoint 4", 2)):
        output = tmp_path / kill.replace(" ", "-")
        arguments = ["train", recipe, f"output={output}"]
        begin = time.monotonic()
        codes, shown = start_each(arguments, arguments, kill=kill)
        assert time.monotonic() - begin < 200
        killed = int(kill[0])
        assert (codes[killed], codes[1 - killed]) == (-9, 1), shown
        assert f"error: process {1 - killed} of 2 cannot reach the others: one was stopped" in shown[1 - killed]
        assert "Traceback" not in shown[1 - killed]
        assert not any((output / name).exists() for name in ("summary.json", "adapter_config.json", WEIGHTS))
        found = [path.name for path in list_checkpoints(output / "checkpoints") if is_whole(path)]
        assert found == ([] if goes_on_from is None else [f"checkpoint-{goes_on_from}"])

        code, shown = start(2, *arguments, "--resume", notes="resumed")
        assert code == 0, shown
        assert ("resuming from" in shown) is (goes_on_from is not None)
        assert hash_file(output / WEIGHTS) == hash_file(whole / WEIGHTS)
        assert read_summary(output)["losses"] == read_summary(whole)["losses"]


def test_a_process_that_never_comes_is_waited_for_no_longer_than_said(start_each, recipe, tmp_path):
    begin = time.monotonic()
    (code,), (shown,) = start_each(["train", recipe, "training.trainer.ddp_timeout=5"], size=2)
    assert time.monotonic() - begin < 100
    assert code == 1, shown
    assert "error: process 0 of 2 cannot reach the others: one was stopped, or did not come in time (" in shown
    assert not (tmp_path / "run").exists()


def test_processes_with_different_recipes_or_options_are_refused(start_each, recipe, tmp_path):
    arguments = ["train", recipe, "--resume"]
    codes, shown = start_each(arguments, ["train", recipe, "training.learning_rate=0.5", "objective.name=last_answer"])
    assert codes == [2, 2], shown
    differing = "--resume: True -> False; objective.name: all_answers -> last_answer; training.learning_rate: 0.01 -> 0.5"
    for text in shown:
        assert f"error: process 1 was not started with the same as process 0 ({differing}; on the left process 0)" in text
    assert not (tmp_path / "run").exists()


@pytest.fixture
def request_and_options(tiny_model_folder, suite_folder):
    """An evaluation of two models on two tasks, two seeds and three points, as Python and as the command line ask for it."""
    suite, models = suite_folder(), [str(tiny_model_folder(name)) for name in ("llama", "qwen2")]
    request = EvaluationRequest(
        models=tuple(models),
        tasks=str(suite),
        only=("speed", "mood"),
        shots=(0, 2, "max"),
        num_seeds=2,
        num_queries=3,
        context_tokens=120,
    )
    options = ["--tasks", suite, "--only", "speed,mood", "--shots", "0,2,max", "--seeds", 2, "--queries", 3, "--context", 120]
    return request, ["evaluate", *[part for model in models for part in ("--model", model)], *options]


def described(records) -> list[str]:
    """Records without the time they took, sorted."""
    return sorted(str(record.model_dump(exclude={"seconds", "prefill_seconds"})) for record in records)


def test_records_of_two_processes_are_those_of_one(start, request_and_options, tmp_path):
    request, options = request_and_options
    alone = evaluate_models(request, tmp_path / "alone.jsonl")
    assert len(alone) == 24
    output = tmp_path / "shared.jsonl"
    code, shown = start(2, *options, "--output", output)
    assert code == 0, shown
    assert shown.count(f"records: {output}") == 1  # The last to finish prints the table.
    assert described(read_records(output)) == described(alone)
    assert [path.name for path in tmp_path.glob("shared.jsonl*")] == ["shared.jsonl"]
    cells = [(tmp_path / f"notes-2-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert [len(own) for own in cells] == [12, 12]
    assert len({*cells[0], *cells[1]}) == 24


@pytest.mark.parametrize(
    "meeting",
    [
        ["--node-rank", "{number}", "--master-addr", "127.0.0.1", "--master-port", "{port}"],
        ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:{port}", "--rdzv-id", "job"],
    ],
    ids=["node-rank", "rdzv"],
)
def test_records_of_two_machines_are_those_of_one(start_machines, request_and_options, tmp_path, meeting):
    request, options = request_and_options
    output = tmp_path / "shared.jsonl"
    codes, shown = start_machines(*options, "--output", output, meeting=meeting)
    assert codes == [0, 0], shown
    assert sorted(text.count(f"records: {output}") for text in shown) == [0, 1]
    assert sorted(text.count("of 2 has finished its share") for text in shown) == [0, 1]
    cells = [(tmp_path / f"notes-2-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert [len(own) for own in cells] == [12, 12]
    assert len({*cells[0], *cells[1]}) == 24
    assert described(read_records(output)) == described(evaluate_models(request, tmp_path / "alone.jsonl"))
    assert [path.name for path in tmp_path.glob("shared.jsonl*")] == ["shared.jsonl"]


@pytest.mark.parametrize("number", [1, 2])
def test_an_interrupted_evaluation_goes_on_with_any_number_of_processes(start, start_each, request_and_options, tmp_path, number):
    request, options = request_and_options
    output = tmp_path / "shared.jsonl"
    options = [*options, "--output", output]
    codes, shown = start_each(options, options, kill="1 cell 5")
    assert codes == [0, -9], shown
    assert "process 0 of 2 has finished its share" in shown[0]
    assert "records: " not in shown[0]
    assert not output.exists()
    left = {path.suffix: read_records(path) for path in tmp_path.glob("shared.jsonl.*")}
    assert {suffix: len(records) for suffix, records in left.items()} == {".done": 12, ".part": 5}

    code, shown = start(number, *options, notes="more")
    assert code == 0, shown
    assert shown.count(f"records: {output}") == 1
    computed = [line for path in tmp_path.glob(f"more-{number}-*") for line in path.read_text().splitlines()]
    # Seven are left; one process finds in the first order's records what two of them would be, without demonstrations.
    assert len(computed) == {1: 5, 2: 7}[number]
    assert described(read_records(output)) == described(evaluate_models(request, tmp_path / "alone.jsonl"))
    assert [path.name for path in tmp_path.glob("shared.jsonl*")] == ["shared.jsonl"]
