"""The trainer: losses over whole updates, dtypes, logs, checkpoints that are kept, and what stops a run."""

import errno
import json
import logging
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from manyicl import arguments, checkpoints, training
from manyicl.arguments import training_arguments
from manyicl.checkpoints import is_whole, list_checkpoints
from manyicl.config import LoraConfig, TrainingConfig
from manyicl.encoding import Encoder
from manyicl.errors import CheckpointError, ManyICLError, RecipeError, StorageError
from manyicl.modeling import add_lora
from manyicl.objective import answer_losses, count_units, shard_losses, shift_targets
from manyicl.training import ManyShotTrainer, Validation, to_tensors, train_model
from model_fixtures import (
    Config,
    FixedRows,
    count_calls,
    gradients_of,
    largest_difference,
    make_row,
    reference_loss,
    sequence_of,
    weights_of,
)

NUMBERS = [[0, 1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11], [12, 13, 14, 15], [16, 17], [18, 19, 20], [21, 22], [23, 24]]
SGD = {"learning_rate": 1.0, "schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0, "trainer": {"optim": "sgd"}}


@pytest.fixture(scope="module")
def encoder(byte_tokenizer):
    return Encoder(byte_tokenizer)


@pytest.fixture
def run(encoder, tiny_model, tmp_path):
    """A short run; gives the model, the rows asked for and the result."""

    def start(
        model=None, *, numbers=NUMBERS, objective=None, validation=None, patience=None, resume=False, output=tmp_path, **fields
    ):
        settings = {"num_steps": 4, "tune": "full", "dtype": "float32", "log_every": 1, "save_every": 2, "learning_rate": 0.01}
        config = TrainingConfig.model_validate(settings | fields)
        dataset = FixedRows([make_row(encoder, own) for own in numbers][: config.num_steps * config.rows_per_step])
        model = tiny_model("llama") if model is None else model
        result = train_model(
            model,
            dataset,
            arguments=training_arguments(config, output / "checkpoints", seed=0, validate=bool(validation)),
            objective=Config(objective or {}),
            validation=Validation(validation, patience) if validation else None,
            resume=resume,
        )
        return model, dataset, result

    return start


def script_validation(monkeypatch, losses, snapshots=None):
    """Replace validation by these losses, one a checkpoint; the weights that they are measured on go to `snapshots`."""
    scripted = iter(losses)

    def evaluate(trainer, *arguments, **options):
        if snapshots is not None:
            snapshots.append(weights_of(trainer.model))
        metrics = {"eval_loss": next(scripted)}
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    monkeypatch.setattr(ManyShotTrainer, "evaluate", evaluate)


def read_log(folder: Path) -> list[dict]:
    """What the newest checkpoint says was logged."""
    return json.loads((list_checkpoints(folder / "checkpoints")[-1] / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("normalisation", ["token", "answer", "episode"])
@pytest.mark.parametrize("name", ["all_answers", "last_answer", "reweighted"])
def test_one_batch_of_two_rows_and_two_of_one_make_the_same_update(run, encoder, tiny_model, tmp_path, name, normalisation):
    objective = {"name": name, "normalisation": normalisation}
    options = {"num_steps": 1, "rows_per_step": 2, "objective": objective} | SGD
    start = weights_of(tiny_model("llama"))
    together, _, _ = run(rows_per_device=2, output=tmp_path / "a", **options)
    apart, _, _ = run(rows_per_device=1, output=tmp_path / "b", **options)
    assert largest_difference(weights_of(together), weights_of(apart)) < 1e-5
    # With plain SGD at rate 1 the update is the gradient, which the reference computes from whole logits.
    model = tiny_model("llama")
    total, units = reference_loss(model, [[sequence_of(encoder, own)] for own in NUMBERS[:2]], Config(objective))
    (total / units).backward()
    updates = {name: start[name] - weight for name, weight in weights_of(apart).items()}
    assert largest_difference(updates, gradients_of(model)) < 1e-5


def test_the_logged_loss_is_the_mean_over_the_whole_update(run, encoder, tiny_model, tmp_path):
    _, _, result = run(num_steps=2, rows_per_step=2, objective={"normalisation": "token"})
    rows = [[sequence_of(encoder, own)] for own in NUMBERS[:2]]
    total, units = reference_loss(tiny_model("llama"), rows, Config({}))
    assert result.losses[0] == (1, pytest.approx(total.item() / units, rel=1e-5))


def test_the_log_holds_the_loss_by_shot(run, encoder, tiny_model, tmp_path):
    run(num_steps=2)
    first = read_log(tmp_path)[0]
    sequence = sequence_of(encoder, NUMBERS[0])
    logits = tiny_model("llama")(input_ids=torch.tensor([sequence.token_ids])).logits[0].log_softmax(-1)
    own = [
        -sum(logits[place - 1, sequence.token_ids[place]].item() for place in range(start, stop)) / (stop - start)
        for start, stop in sequence.answer_spans
    ]
    shots = {key: value for key, value in first.items() if key.startswith("loss/")}
    assert list(shots) == ["loss/shot_0", "loss/shot_1", "loss/shot_2-3", "loss/shot_4-7"]
    assert shots["loss/shot_0"] == pytest.approx(own[0], abs=1e-4)
    assert shots["loss/shot_1"] == pytest.approx(own[1], abs=1e-4)
    assert first["loss/shot_4-7"] == pytest.approx(sum(own[4:7][i] * n for i, n in enumerate((3, 4, 5))) / 12, abs=1e-4)
    assert first["tokens_per_second"] > 0


def test_rows_are_fed_in_order_and_once_and_counted(run):
    _, dataset, result = run(num_steps=4, rows_per_step=2)
    assert dataset.asked == list(range(8))
    assert result.updates == 4
    assert result.tokens == sum(row.num_tokens for row in dataset.rows)
    assert result.answers == sum(len(own) for own in NUMBERS)
    assert 0 < result.seconds < 60
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)


def test_a_resumed_run_asks_for_the_rest_of_the_rows_and_ends_at_the_same_weights(run, tiny_model, tmp_path, monkeypatch):
    whole, _, expected = run(rows_per_step=2, output=tmp_path / "whole")
    step = ManyShotTrainer.training_step

    def interrupted(trainer, *arguments, **options):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ManyShotTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(rows_per_step=2)
    model, dataset, result = run(rows_per_step=2, resume=True)
    assert dataset.asked == [4, 5, 6, 7]
    assert all(torch.equal(weight, weights_of(whole)[name]) for name, weight in weights_of(model).items())
    assert result.losses == expected.losses
    assert (result.updates, result.tokens, result.answers) == (expected.updates, expected.tokens, expected.answers)


def test_resuming_a_run_whose_last_checkpoint_is_its_end_trains_no_more(run, monkeypatch):
    whole, _, _ = run()
    steps = count_calls(monkeypatch, ManyShotTrainer, "training_step")
    model, dataset, result = run(resume=True)
    assert (steps, dataset.asked, result.updates) == ([], [], 4)
    assert all(torch.equal(weight, weights_of(whole)[name]) for name, weight in weights_of(model).items())


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_full_tuning_computes_in_bfloat16_and_keeps_fp32_weights(run, tiny_model, monkeypatch, dtype):
    monkeypatch.setattr(arguments, "resolve_dtype", lambda name: torch.bfloat16)
    model = tiny_model("llama")
    start = weights_of(model)
    computed = set()
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, inputs, output: module.training and computed.add(output.dtype))
    run(model, num_steps=1, dtype=dtype, **SGD | {"learning_rate": 1e-6})
    assert computed == {torch.bfloat16}
    end = weights_of(model)
    assert {weight.dtype for weight in end.values()} == {torch.float32}
    moved = end["lm_head.weight"] - start["lm_head.weight"]
    assert moved.abs().max() > 0
    assert torch.equal(end["lm_head.weight"].bfloat16(), start["lm_head.weight"].bfloat16())  # bf16 weights would have lost it.


def test_gradient_checkpointing_changes_no_weight_by_more_than_rounding(run, tiny_model, tmp_path):
    lora = LoraConfig.model_validate({"rank": 4})
    models = [add_lora(tiny_model("llama"), lora, seed=1) for _ in range(2)]
    for number, model in enumerate(models):
        run(model, output=tmp_path / str(number), gradient_checkpointing=bool(number), **SGD)
    assert largest_difference(weights_of(models[0]), weights_of(models[1])) < 1e-6
    start = weights_of(add_lora(tiny_model("llama"), lora, seed=1))
    assert largest_difference(weights_of(models[0]), start) > 1e-3


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_do(run, tiny_model, tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(ManyICLError, match=r"the loss is nan at update 1\. Lower training\.learning_rate"):
        run(model)
    assert list_checkpoints(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_gradients_that_are_not_finite_never_reach_the_weights(run, tiny_model, tmp_path, max_grad_norm):
    model = tiny_model("llama")
    calls = []

    def spoil(gradient):
        calls.append(1)
        return gradient * float("inf") if len(calls) == 3 else gradient

    model.lm_head.weight.register_hook(spoil)
    with pytest.raises(ManyICLError, match=r"the gradient norm is (nan|inf) at update 3"):
        run(model, max_grad_norm=max_grad_norm, save_every=1)
    assert all(torch.isfinite(weight).all() for weight in weights_of(model).values())
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["checkpoint-1", "checkpoint-2"]


def test_processes_that_accelerate_does_not_join_are_refused(encoder, tiny_model, tmp_path, monkeypatch):
    config = TrainingConfig.model_validate({"num_steps": 2, "rows_per_step": 2})
    alone = training_arguments(config, tmp_path, seed=0, validate=False)
    rows = FixedRows([make_row(encoder, own) for own in NUMBERS])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=r"^1 process\(es\) would feed 2 rows in an update, and .*_step = 4\. Start them with"):
        train_model(tiny_model("llama"), rows, arguments=alone, objective=Config({}))


def test_tensorboard_gets_the_loss_by_shot(run, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, _, result = run(num_steps=2, report_to=["tensorboard"])
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    read = event_accumulator.EventAccumulator(str(events.parent))
    read.Reload()
    assert [event.value for event in read.Scalars("train/loss")] == pytest.approx([loss for _, loss in result.losses], rel=1e-6)
    assert len(read.Scalars("train/loss/shot_0")) == 2


def test_the_best_validated_checkpoint_is_the_one_that_is_kept(run, encoder, tmp_path, monkeypatch):
    snapshots = []
    script_validation(monkeypatch, [3.0, 1.0, 2.0, 4.0], snapshots)
    model, _, result = run(validation=[make_row(encoder, [0, 1])], num_steps=4, save_every=1)
    assert result.best_step == 2
    assert all(torch.equal(weight, snapshots[1][name]) for name, weight in weights_of(model).items())
    kept = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert kept == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_training_stops_after_checkpoints_without_a_better_loss(run, encoder, tmp_path, monkeypatch):
    snapshots = []
    script_validation(monkeypatch, [3.0, 1.0, 2.0, 4.0, 0.5], snapshots)
    model, _, result = run(validation=[make_row(encoder, [0, 1])], patience=2, num_steps=5, save_every=1)
    assert (result.updates, result.best_step) == (4, 2)
    assert all(torch.equal(weight, snapshots[1][name]) for name, weight in weights_of(model).items())


def test_the_last_update_is_validated_too(run, encoder, tmp_path):
    validation = [make_row(encoder, [30, 31, 32]), make_row(encoder, [33, 34])]
    model, _, result = run(validation=validation, num_steps=3, save_every=2)
    measured = {entry["step"]: entry["eval_loss"] for entry in read_log(tmp_path) if "eval_loss" in entry}
    assert list(measured) == [2, 3]
    total, units = reference_loss(model, [row.sequences for row in validation], Config({}))
    assert measured[result.best_step] == min(measured.values())
    assert measured[result.best_step] == pytest.approx(total.item() / units, rel=1e-5)


def test_validation_measures_every_answer_whatever_is_trained(run, encoder, tmp_path):
    validation = [make_row(encoder, [30, 31, 32])]
    for name in ("all_answers", "last_answer"):
        options = {"num_steps": 1, "save_every": 1, **SGD, "learning_rate": 1e-12}
        run(validation=validation, objective={"name": name, "normalisation": "episode"}, output=tmp_path / name, **options)
    first, second = (read_log(tmp_path / name)[-1]["eval_loss"] for name in ("all_answers", "last_answer"))
    assert first == pytest.approx(second, rel=1e-6)


def test_the_best_checkpoint_is_found_again_after_the_run_was_moved(run, encoder, tmp_path, monkeypatch):
    script_validation(monkeypatch, [1.0, 2.0])
    validation = [make_row(encoder, [0, 1])]
    model, _, _ = run(validation=validation, num_steps=2, save_every=1, output=tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    resumed, _, result = run(validation=validation, num_steps=2, save_every=1, output=tmp_path / "new", resume=True)
    assert result.best_step == 1
    assert all(torch.equal(weight, weights_of(model)[name]) for name, weight in weights_of(resumed).items())
    (tmp_path / "new" / "checkpoints" / "checkpoint-1" / "manifest.json").unlink()
    (tmp_path / "new" / "checkpoints" / "checkpoint-1").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="checkpoint-1: the best checkpoint is gone"):
        run(validation=validation, num_steps=2, save_every=1, output=tmp_path / "new", resume=True)


def test_a_full_disk_is_a_storage_error_and_the_earlier_checkpoint_stays_whole(run, tmp_path, monkeypatch):
    seal = checkpoints.seal_checkpoint

    def fail_on_the_second(folder):
        if folder.name == "checkpoint-4":
            raise OSError(errno.ENOSPC, "No space left on device")
        seal(folder)

    monkeypatch.setattr(training, "seal_checkpoint", fail_on_the_second)
    with pytest.raises(StorageError, match=r"checkpoint-4: cannot be written \(No space left on device\)\. Free some space"):
        run()
    first, second = list_checkpoints(tmp_path / "checkpoints")
    assert (is_whole(first), is_whole(second)) == (True, False)


@pytest.mark.parametrize("limit", [50_000, 250_000])  # The weights (140 kB) do not fit; they do, but the optimizer's do not.
def test_weights_and_optimizer_states_that_cannot_be_written_are_storage_errors(run, tmp_path, limit):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(StorageError, match="checkpoint-2: cannot be written"):
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    (left,) = list_checkpoints(tmp_path / "checkpoints")
    assert (left / "model.safetensors").is_file() is (limit == 250_000)
    assert not is_whole(left)


def test_context_parallel_training_cuts_rows_together_with_their_targets(run, encoder, tiny_model, monkeypatch):
    # Of two processes that share a row this is the one with the front half, which causal attention needs no other for.
    @contextmanager
    def keep_front_half(buffers, buffer_seq_dims, no_restore_buffers):
        assert buffer_seq_dims == [1] * len(buffers)
        assert no_restore_buffers == set(buffers)
        for buffer in buffers:  # In place, as torch does it.
            half = buffer[:, : buffer.shape[1] // 2].clone()
            buffer.resize_(half.shape).copy_(half)
        yield

    monkeypatch.setattr(ManyShotTrainer, "get_cp_size", lambda trainer: 2)
    monkeypatch.setattr(Accelerator, "maybe_context_parallel", staticmethod(keep_front_half))
    _, _, result = run(num_steps=1)
    row = make_row(encoder, NUMBERS[0])
    batch = to_tensors([row])
    shifted = shift_targets(batch, Config({}), multiple=4)
    half = {name: values[:, : values.shape[1] // 2] for name, values in shifted.items()}
    front = shard_losses(tiny_model("llama"), half, in_head=True).total.item()
    assert 0 < front < answer_losses(tiny_model("llama"), batch, Config({}), in_head=True).total.item()
    assert result.losses == [(1, pytest.approx(front / (int(count_units(batch, Config({}))) // 2), rel=1e-5))]
    assert result.tokens == row.num_tokens // 2  # Both count the row, and the sum is halved.


def test_log_lines_are_for_people(run, caplog):
    with caplog.at_level(logging.INFO, logger="manyicl.training"):
        run(num_steps=2)
    lines = [record.getMessage() for record in caplog.records if record.name == "manyicl.training"]
    assert lines[0].startswith("update 1/2 loss=")
    assert "loss/shot_0=" in lines[0]


def test_a_terminal_gets_a_progress_bar_with_the_numbers_beside_it(run, capsys, monkeypatch):
    monkeypatch.setattr(training.sys.stderr, "isatty", lambda: True, raising=False)
    run(num_steps=2)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "loss=" in shown
    assert "{'loss'" not in shown
