"""Killed and resumed = uninterrupted, to the last bit: the same command with --resume after a SIGKILL at any moment.

Every run is a process of its own on two threads, in bf16 where the processor has it. To save seconds of importing, most are
forked from one process that has imported everything and run nothing. A kill while a checkpoint is written comes from inside
the write.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manyicl.checkpoints import is_whole, list_checkpoints
from manyicl.files import hash_file
from model_fixtures import make_recipe, write_recipe

pytestmark = pytest.mark.slow

WEIGHTS = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}
LAUNCHER = r"""
import json, os, signal, sys
from transformers import Trainer
from manyicl import checkpoints, runs, training
from manyicl.cli import main

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def kill_inside(number, moment):
    save_optimizer, seal, drop = Trainer._save_optimizer_and_scheduler, training.seal_checkpoint, training.drop_old_checkpoints
    def before_optimizer(trainer, folder):
        die() if folder.endswith(f"-{number}") else save_optimizer(trainer, folder)
    def inside_optimizer(trainer, folder):
        save_optimizer(trainer, folder)
        if folder.endswith(f"-{number}"):
            os.truncate(f"{folder}/optimizer.pt", os.path.getsize(f"{folder}/optimizer.pt") // 2)
            die()
    if moment == "weights written, optimizer not":
        Trainer._save_optimizer_and_scheduler = before_optimizer
    elif moment == "half of the optimizer written":
        Trainer._save_optimizer_and_scheduler = inside_optimizer
    elif moment == "all written, not sealed":
        training.seal_checkpoint = lambda folder: die() if folder.name.endswith(f"-{number}") else seal(folder)
    elif moment == "sealed, old ones not dropped":
        training.drop_old_checkpoints = lambda folder, **options: (
            die() if (folder / f"checkpoint-{number}").is_dir() else drop(folder, **options)
        )
    elif moment == "trained, model not saved":
        runs.save_model = die
    else:
        raise ValueError(moment)

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = ["manyicl", *job["arguments"]]
        code = 1
        try:
            if job["kill"]:
                kill_inside(*job["kill"])
            main()
            code = 0
        except SystemExit as error:
            code = error.code
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def environment():
    return os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def launch(environment):
    """Runs `manyicl ARGUMENTS` in a forked process; gives its exit code (-9: killed) and what it printed."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(arguments, log, *, kill=None):
        print(json.dumps({"arguments": arguments, "log": str(log), "kill": kill}), file=launcher.stdin, flush=True)
        reply = launcher.stdout.readline()
        assert reply, f"the launcher ended with {launcher.wait(timeout=60)}"
        return int(reply), log.read_text()

    with launcher:
        yield run
        launcher.stdin.close()
        launcher.wait(timeout=60)


@pytest.fixture(scope="module")
def whole_runs():
    """Uninterrupted runs that were made: tune -> (recipe file, folder)."""
    return {}


@pytest.fixture
def uninterrupted(tmp_path_factory, tiny_model_folder, suite_folder, launch, whole_runs):
    """The recipe file and the folder of an uninterrupted run, made once."""

    def get(tune):
        if tune not in whole_runs:
            folder = tmp_path_factory.mktemp(tune)
            training = {
                "num_steps": 6,
                "save_every": 2,
                "rows_per_step": 2,
                "tune": tune,
                "dtype": "auto",
                "lora": {"rank": 4, "dropout": 0.1},
            }
            suite = suite_folder().rename(folder / "suite")
            recipe = make_recipe(tiny_model_folder("llama", head_dim=16), suite, folder / "whole", training=training)
            path = write_recipe(folder / "recipe.yaml", recipe)
            code, shown = launch(["train", str(path)], folder / "log.txt")
            assert code == 0, shown
            whole_runs[tune] = path, folder / "whole"
        return whole_runs[tune]

    return get


def assert_same_run(tune: str, whole: Path, resumed: Path) -> None:
    assert hash_file(resumed / WEIGHTS[tune]) == hash_file(whole / WEIGHTS[tune])
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (whole, resumed))
    for name in ("updates", "tokens", "answers", "losses", "best_step"):
        assert first[name] == second[name], name
    last = [list_checkpoints(folder / "checkpoints")[-1] for folder in (whole, resumed)]
    assert [path.name for path in last] == ["checkpoint-6", "checkpoint-6"]
    for name in ("scheduler.pt", "optimizer.pt", WEIGHTS[tune]):
        assert hash_file(last[0] / name) == hash_file(last[1] / name), name
    assert [json.loads((path / "trainer_state.json").read_text())["global_step"] for path in last] == [6, 6]


def test_a_kill_from_outside_at_some_moment_after_a_checkpoint(uninterrupted, launch, environment, tmp_path):
    recipe, whole = uninterrupted("lora")
    output = tmp_path / "killed"
    arguments = ["train", str(recipe), f"output={output}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "manyicl", *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while not (output / "checkpoints" / "checkpoint-2" / "manifest.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not (output / "summary.json").exists()
    done = subprocess.run(
        [sys.executable, "-m", "manyicl", *arguments, "--resume"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert f"resuming from {output}/checkpoints/checkpoint-" in done.stderr
    assert_same_run("lora", whole, output)


@pytest.mark.parametrize(
    ("tune", "moment", "number", "goes_on_from"),
    [
        ("lora", "weights written, optimizer not", 2, None),
        ("lora", "half of the optimizer written", 4, 2),
        ("full", "half of the optimizer written", 4, 2),
        ("lora", "all written, not sealed", 4, 2),
        ("full", "sealed, old ones not dropped", 6, 6),
        ("lora", "trained, model not saved", 6, 6),
    ],
)
def test_a_kill_from_inside(uninterrupted, launch, tmp_path, tune, moment, number, goes_on_from):
    recipe, whole = uninterrupted(tune)
    output = tmp_path / "killed"
    arguments = ["train", str(recipe), f"output={output}"]
    code, shown = launch(arguments, tmp_path / "killed.txt", kill=[number, moment])
    assert code == -signal.SIGKILL, shown
    sealed = moment in ("sealed, old ones not dropped", "trained, model not saved")
    assert is_whole(output / "checkpoints" / f"checkpoint-{number}") is sealed
    code, shown = launch([*arguments, "--resume"], tmp_path / "resumed.txt")
    assert code == 0, shown
    if goes_on_from is None:
        assert "resuming from" not in shown
    else:
        assert f"resuming from {output}/checkpoints/checkpoint-{goes_on_from}" in shown
    assert_same_run(tune, whole, output)


def test_killed_twice(uninterrupted, launch, tmp_path):
    recipe, whole = uninterrupted("lora")
    output = tmp_path / "killed"
    arguments = ["train", str(recipe), f"output={output}", "--resume"]
    for number, moment in ((4, "half of the optimizer written"), (6, "all written, not sealed")):
        code, shown = launch(arguments, tmp_path / f"{number}.txt", kill=[number, moment])
        assert code == -signal.SIGKILL, shown
    code, shown = launch(arguments, tmp_path / "resumed.txt")
    assert (code, f"resuming from {output}/checkpoints/checkpoint-4" in shown) == (0, True)
    assert_same_run("lora", whole, output)
