"""Shards = the whole: weights shared out over processes (FSDP2), and rows cut into parts (context parallelism).

FSDP2 runs in two gloo processes through torch's own `fully_shard`, on the model as training wraps it and with training's loss;
and once from a recipe through transformers and Accelerate, which is told for the test that processors count as GPUs do.
Tolerance in fp32: 1e-5 on losses and gradients, as sums are taken in another order. Ring attention has no kernel for
processors, so that of context parallelism the property is tested that makes it exact: however rows are cut, the losses of the
parts sum to those of the whole (means to 1e-5).
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from manyicl.checkpoints import is_whole, list_checkpoints
from manyicl.config import EpisodesConfig, LoraConfig
from manyicl.encoding import Encoder
from manyicl.errors import BudgetError, RecipeError
from manyicl.modeling import add_lora, load_model
from manyicl.objective import answer_losses, count_units, shard_losses, shift_targets
from manyicl.packing import RowDataset
from manyicl.training import prepare_for_training, to_tensors
from model_fixtures import Config, gradients_of, largest_difference, letter_task, make_batch, make_recipe, write_recipe

TESTS = Path(__file__).parents[1]
ROWS = [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10]]
OBJECTIVES = [
    {"name": name, "normalisation": normalisation}
    for name in ("all_answers", "last_answer")
    for normalisation in ("token", "answer", "episode")
]

# One of two processes: shards a model, runs its own row and gathers what came of it; the main one writes that down.
FULLY_SHARD = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from manyicl.encoding import Encoder
from manyicl.modeling import load_model, save_model
from manyicl.objective import answer_losses, count_units
from manyicl.process_group import gather_weights, join_processes, leave_processes, place_among_processes
from manyicl.training import WholeModel
from model_fixtures import Config, make_batch
from test_sharded import ROWS, model_to_train

source, output = sys.argv[1:]
join_processes(60)
rank, size = place_among_processes()
for tune in ("lora", "full"):
    loaded = load_model(source, dtype="float32")
    model = model_to_train(loaded, tune)
    for layer in loaded.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    weights = list(model.parameters())
    assert all(isinstance(weight, DTensor) for weight in weights)
    assert sum(weight.to_local().numel() for weight in weights) < 0.6 * sum(weight.numel() for weight in weights)

    batch, config = make_batch(Encoder(loaded.tokenizer), [ROWS[rank]]), Config({"normalisation": "answer"})
    units = torch.tensor(float(count_units(batch, config)))
    distributed.all_reduce(units)
    losses = answer_losses(model, batch, config, in_head=True)
    (losses.total / units * size).backward()
    loss = losses.total.detach() / units
    distributed.all_reduce(loss)
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(isinstance(gradient, DTensor) for gradient in gradients.values())
    gathered = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    whole = gather_weights(model, trained_only=tune == "lora")
    if rank == 0:
        save_file(gathered | {"loss": loss}, Path(output) / f"{tune}.safetensors")
        save_model(WholeModel(model, whole), loaded.tokenizer, Path(output) / tune, base=source, note="")
    else:
        assert whole == {}
leave_processes()
"""

# The command line, in an Accelerate that turns FSDP on without GPUs.
FORCED_FSDP = """
from accelerate import state
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from manyicl import arguments, training
from manyicl.cli import main

arguments._check_sharing = lambda recipe: None
begin = state.AcceleratorState.__init__
def begin_sharded(self, *positional, fsdp_plugin=None, **options):
    begin(self, *positional, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
state.AcceleratorState.__init__ = begin_sharded

step = training.ManyShotTrainer.training_step
def sharded_step(trainer, model, *positional, **options):
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    return step(trainer, model, *positional, **options)
training.ManyShotTrainer.training_step = sharded_step
main()
"""


def model_to_train(loaded, tune):
    """The model as `runs.train` hands it to the trainer, with adapters that already do something."""
    model = loaded.model
    if tune == "lora":
        model = add_lora(model, LoraConfig.model_validate({"rank": 4}), seed=1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.fill_(0.01)
    prepare_for_training(model)
    return model.train()


def start_two(script: str, *arguments: object) -> str:
    """Run a script in two processes that can join, without a launcher; what they printed, once both have ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(TESTS / "equivalence"), str(TESTS), os.environ.get("PYTHONPATH", "")])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    shown = "\n".join(process.communicate(timeout=300)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], shown
    return shown


@pytest.mark.distributed
@pytest.mark.slow
def test_a_sharded_model_has_the_loss_and_gradients_of_a_whole_one_and_is_saved_whole(tiny_model_folder, tmp_path):
    folder = tiny_model_folder("llama")
    start_two(FULLY_SHARD, folder, tmp_path)
    for tune, weights in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        sharded = load_file(tmp_path / f"{tune}.safetensors")
        loaded = load_model(folder, dtype="float32")
        model, config = model_to_train(loaded, tune), Config({"normalisation": "answer"})
        batch = make_batch(Encoder(loaded.tokenizer), *([row] for row in ROWS))
        loss = answer_losses(model, batch, config, in_head=True).total / count_units(batch, config)
        loss.backward()
        assert float(sharded.pop("loss")) == pytest.approx(loss.item(), abs=1e-5)
        gradients = gradients_of(model)
        assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-2
        assert largest_difference(gradients, sharded) < 1e-5

        assert (tmp_path / tune / weights).is_file()
        saved = load_model(tmp_path / tune, dtype="float32").model
        whole = model.merge_and_unload() if tune == "lora" else model
        assert largest_difference(saved.state_dict(), whole.state_dict()) == 0.0


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_recipe_with_fsdp_ends_where_one_process_does(tune, tiny_model_folder, suite_folder, tmp_path):
    training = {"num_steps": 4, "rows_per_step": 4, "save_every": 2, "validate_checkpoints": True, "validation_rows": 2}
    alone = make_recipe(tiny_model_folder("llama"), suite_folder(), tmp_path / "alone", training=training | {"tune": tune})
    subprocess.run(
        [sys.executable, "-m", "manyicl", "train", write_recipe(tmp_path / "alone.yaml", alone)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
    )
    sharded = alone.model_copy(
        update={"output": str(tmp_path / "fsdp"), "training": alone.training.model_copy(update={"trainer": {"fsdp": True}})}
    )
    shown = start_two(FORCED_FSDP, "train", write_recipe(tmp_path / "fsdp.yaml", sharded))
    assert shown.count("4 updates, ") == 1
    folders = tmp_path / "alone", tmp_path / "fsdp"
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    assert len(one["losses"]) == 4
    for name in ("losses", "validation_losses"):
        assert [loss for _, loss in one[name]] == pytest.approx([loss for _, loss in two[name]], abs=1e-5)
    assert (one["updates"], one["tokens"], one["answers"], one["best_step"]) == tuple(
        two[name] for name in ("updates", "tokens", "answers", "best_step")
    )
    norms = [
        [
            entry["grad_norm"]
            for entry in json.loads((newest / "trainer_state.json").read_text())["log_history"]
            if "grad_norm" in entry
        ]
        for newest in (list_checkpoints(folder / "checkpoints")[-1] for folder in folders)
    ]
    assert len(norms[0]) == 4
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    weights = "adapter_model.safetensors" if tune == "lora" else "model.safetensors"
    assert largest_difference(*(load_file(folder / weights) for folder in folders)) < 1e-4
    assert all(is_whole(path) for path in list_checkpoints(tmp_path / "fsdp" / "checkpoints"))


class RingAttention(torch.nn.Module):
    """Stands for a model whose attention sees the whole row, though its input is a part: answers from logits of the whole."""

    def __init__(self, model: torch.nn.Module, input_ids: torch.Tensor) -> None:
        super().__init__()
        self.input_ids = input_ids
        self.logits = model(input_ids=input_ids, use_cache=False).logits

    def forward(self, input_ids, position_ids, logits_to_keep, use_cache):
        lines = torch.arange(len(input_ids)).unsqueeze(1)
        inside = position_ids < self.input_ids.shape[1]  # Others are padding.
        own = position_ids.clamp(max=self.input_ids.shape[1] - 1)
        assert torch.equal(self.input_ids[lines, own][inside], input_ids[inside])
        return SimpleNamespace(logits=self.logits[lines, own][:, logits_to_keep])


def cuts_of(length: int) -> dict[str, list[torch.Tensor]]:
    """Ways to share a row's positions out: as rings do (a part of the front with one of the back), and others."""
    positions = torch.arange(length)
    quarters = positions.chunk(4)
    owner = torch.randint(0, 3, (length,), generator=torch.Generator().manual_seed(0))
    return {
        "one": [positions],
        "halves": list(positions.chunk(2)),
        "ring": [torch.cat([quarters[0], quarters[3]]), torch.cat([quarters[1], quarters[2]])],
        "every third": [positions[start::3] for start in range(3)],
        "each alone": list(positions.split(1)),
        "random": [positions[owner == number] for number in range(3)],
    }


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: "-".join(objective.values()))
@pytest.mark.parametrize("way", list(cuts_of(8)))
def test_however_rows_are_cut_the_losses_of_the_parts_sum_to_the_whole(way, objective, tiny_model, byte_tokenizer):
    model, config = tiny_model("llama"), Config(objective)
    batch = make_batch(Encoder(byte_tokenizer), *([row] for row in ROWS))
    units = int(count_units(batch, config))
    whole = answer_losses(model, batch, config, in_head=True)
    (whole.total / units).backward()
    gradients = gradients_of(model)
    shifted = shift_targets(batch, config, multiple=8)
    length = shifted["input_ids"].shape[1]
    assert length % 8 == 0
    assert length > batch["input_ids"].shape[1]

    ring = RingAttention(model, batch["input_ids"])
    parts = [
        shard_losses(ring, {name: values[:, own] for name, values in shifted.items()}, in_head=False)
        for own in cuts_of(length)[way]
    ]
    mean = torch.stack([part.total for part in parts]).sum() / units
    mean.backward()
    assert mean.item() == pytest.approx(whole.total.item() / units, abs=1e-5)
    assert largest_difference(gradients_of(model), gradients) < 1e-5
    assert torch.allclose(torch.stack([part.shot_sums for part in parts]).sum(dim=0), whole.shot_sums, rtol=1e-5)
    assert torch.equal(torch.stack([part.shot_counts for part in parts]).sum(dim=0), whole.shot_counts)
    assert float(shifted["weight"].sum()) == pytest.approx(units, rel=1e-6)


def test_a_whole_row_as_its_only_part_goes_through_the_model_itself(tiny_model, byte_tokenizer):
    model, config = tiny_model("llama"), Config({})
    batch = make_batch(Encoder(byte_tokenizer), *([row] for row in ROWS))
    whole = answer_losses(model, batch, config, in_head=True).total.item()
    assert shard_losses(model, shift_targets(batch, config), in_head=True).total.item() == pytest.approx(whole, rel=1e-6)


def test_rows_of_many_shots_hold_one_task_from_position_0_on_and_can_be_cut(byte_tokenizer):
    config = EpisodesConfig.model_validate({"max_tokens": 200})
    tasks = [letter_task("one"), letter_task("two")]
    rows = list(RowDataset(tasks, config=config, encoder=Encoder(byte_tokenizer), seed=0, num_rows=6))
    assert [len(row.sequences) for row in rows] == [1] * 6
    for row in rows:
        batch = to_tensors([row])
        assert batch["position_ids"][0].tolist() == list(range(row.num_tokens))
        shifted = shift_targets(batch, Config({}))
        tokens = row.sequences[0].token_ids
        targets = {place for start, stop in row.sequences[0].answer_spans for place in range(start, stop)}
        chosen = shifted["weight"][0].nonzero().flatten().tolist()
        assert {position + 1 for position in chosen} == targets
        assert [int(shifted["target"][0, position]) for position in chosen] == [tokens[place] for place in sorted(targets)]


def test_rows_that_cannot_be_cut_are_refused(byte_tokenizer):
    encoder = Encoder(byte_tokenizer)
    packed = make_batch(encoder, [[0, 1], [2, 3]])
    with pytest.raises(BudgetError, match=r"needs rows of one sequence each\. Set episodes\.pack to false"):
        shift_targets(packed, Config({}))
    with pytest.raises(RecipeError, match=r"does not go with objective\.name = reweighted\. Choose another objective"):
        shift_targets(make_batch(encoder, [[0, 1]]), Config({"name": "reweighted"}))
