"""Memory of training by hand for a tiny config: by part and moment, as the recipe asks, and what is refused for want of it."""

import re
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from manyicl import planning, runs
from manyicl.config import parse_recipe
from manyicl.errors import BudgetError
from manyicl.kernels import cpu_attention
from manyicl.training_plan import Layout, MemoryParts, TrainingJob, check_training_memory, forecast_memory, memory, peak_bytes
from model_fixtures import make_recipe
from plan_fixtures import CONFIG, FEATURES, LAYER_WEIGHTS, PARAMETERS, SIZES, make_job

CPU = torch.device("cpu")


def test_memory_of_adapters_by_hand() -> None:
    job = make_job()
    adapters = 3 * 4 * FEATURES
    # States and norms, query and output, key and value, gated layer, seven adapters of rank 4; log-sum-exp of four heads.
    layer = 2 * (4 * 12 + 2 * 24 + 2 * 12 + 3 * 20 + 7 * 4) + 4 * 4
    standing = MemoryParts(
        weights=2 * PARAMETERS + 4 * adapters,
        optimizer=8 * adapters,
        other=memory.CPU_RUNTIME_BYTES,
    )
    activations = 200 * (3 * layer + 2 * 12)
    found = forecast_memory(job)
    work = 6 * 2 * 20 * 200
    other = memory.CPU_RUNTIME_BYTES + activations // 5 + 5 * work
    # A tenth of 200 tokens are targets.
    assert found == {
        "loss": replace(standing, activations=activations, logits=12 * 20 * 100, other=other),
        "layers": replace(standing, activations=activations, other=other + work),
        "update": replace(standing, gradients=4 * adapters),
    }
    assert peak_bytes(job) == max(parts.total for parts in found.values())


def test_memory_of_all_weights_by_hand() -> None:
    half, whole = (forecast_memory(make_job(tune="full", dtype=dtype)) for dtype in ("bfloat16", "float32"))
    inner = 2 * 24 + 2 * 12 + 3 * 20
    assert half["loss"].activations == 200 * (3 * (16 * 12 + 5 * 2 * 12 + 2 * inner + 16) + 4 * 12)
    assert whole["loss"].activations == 200 * (3 * (16 * 12 + 8 * 12 + 4 * inner + 16) + 4 * 12)
    assert half["update"].other == memory.CPU_RUNTIME_BYTES + 2 * (3 * LAYER_WEIGHTS + 1200)
    assert whole["update"].other == memory.CPU_RUNTIME_BYTES
    assert (half["layers"].gradients, half["update"].gradients) == (4 * 1200, 4 * PARAMETERS)
    for parts in (half["loss"], whole["loss"]):
        assert (parts.weights, parts.optimizer, parts.gradients) == (4 * PARAMETERS, 8 * PARAMETERS, 0)


def test_parts_add_up() -> None:
    names = [part.name for part in fields(MemoryParts)]
    assert names == ["weights", "gradients", "optimizer", "activations", "logits", "other"]
    parts = MemoryParts(**{name: 10**place for place, name in enumerate(names)})
    assert parts.total == 111_111


def loss_activations(job: TrainingJob) -> int:
    """Bytes that a layer keeps of a token, without what its state takes beside the layers."""
    activations = forecast_memory(job)["loss"].activations
    return (activations // job.tokens - 2 * 12) // 3


def test_what_a_layer_keeps_follows_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = 2 * (4 * 12 + 2 * 24 + 2 * 12 + 3 * 20 + 7 * 4) + 4 * 4
    assert loss_activations(make_job()) == plain
    # Frozen layers keep no input: one norm and the gated product are not kept, and five adapters are not there.
    queries = make_job(lora={"rank": 4, "targets": ["q_proj", "v_proj"]})
    assert loss_activations(queries) == plain - 2 * (12 + 20 + 5 * 4)
    # Dropout: an fp32 copy and a mask of each layer's input, x Aᵀ in fp32, and no bf16 input.
    dropout = make_job(lora={"rank": 4, "dropout": 0.1})
    inputs = 5 * 12 + 24 + 20
    assert loss_activations(dropout) == plain - 2 * (2 * 12 + 20 + 7 * 4) + 8 * inputs + 4 * 7 * 4
    # transformers' own layers: fp32 norms and inputs of adapters, x Aᵀ in fp32, and the gate's activation.
    slow = make_job(kernels="none")
    assert loss_activations(slow) == plain - 2 * (4 * 12 + 7 * 4) + 8 * 12 + 4 * inputs + 4 * 7 * 4
    assert loss_activations(make_job(kernels="none", tune="full")) - loss_activations(make_job(tune="full")) == 2 * 20
    # A mask, and keys and values of all four heads, where our kernel does not keep rows apart itself.
    padded = make_job(rows_per_device=2, rows_per_step=2)
    monkeypatch.setattr(cpu_attention, "is_available", lambda: True)
    assert loss_activations(padded) == plain
    monkeypatch.setattr(cpu_attention, "is_available", lambda: False)
    assert loss_activations(padded) == plain + 2 * 2 * (24 - 12) + 2 * 200
    capped = transformers.Gemma2Config(**SIZES, attn_logit_softcapping=50.0, sliding_window=200, query_pre_attn_scalar=6)
    assert loss_activations(make_job(capped)) == plain + 8 * 4 * 200
    assert loss_activations(make_job(capped, max_tokens=201)) == plain + 8 * 4 * 201 + 2 * 2 * (24 - 12) + 2 * 201


def test_checkpointing_keeps_states_and_one_layer() -> None:
    layer = 2 * (4 * 12 + 2 * 24 + 2 * 12 + 3 * 20 + 7 * 4) + 4 * 4
    found = forecast_memory(make_job(gradient_checkpointing=True))
    assert found["loss"].activations == 200 * (3 + 1) * 2 * 12
    assert found["layers"].activations == 200 * ((3 + 1) * 2 * 12 + layer)
    work = 6 * 2 * 20 * 200
    assert found["layers"].other == memory.CPU_RUNTIME_BYTES + found["layers"].activations // 5 + 6 * work
    on_gpu = forecast_memory(replace(make_job(gradient_checkpointing=True), on_cpu=False))
    assert on_gpu["layers"].other == memory.GPU_RUNTIME_BYTES + work


def test_logits_are_those_of_a_chunk() -> None:
    def logits(job: TrainingJob) -> int:
        return forecast_memory(job)["loss"].logits // (12 * 100)

    assert logits(make_job(max_tokens=4000)) == 400
    assert logits(make_job(max_tokens=6000)) == 512
    # Two rows compute the positions at which either has a target.
    assert logits(make_job(max_tokens=1000, rows_per_device=2, rows_per_step=2)) == 2 * 200
    altered = transformers.Gemma2Config(**SIZES, final_logit_softcapping=30.0)
    assert logits(make_job(altered, max_tokens=6000)) == 600
    assert logits(replace(make_job(), target_share=0.0)) == 1


def test_gradients_of_earlier_passes_stand_beside_activations() -> None:
    one, two = (forecast_memory(make_job(rows_per_step=rows)) for rows in (1, 2))
    assert one["loss"].gradients == one["layers"].gradients == 0
    assert two["loss"].gradients == two["layers"].gradients == two["update"].gradients == 4 * 3 * 4 * FEATURES


def test_fsdp_divides_weights_gradients_and_optimizer() -> None:
    job = make_job(tune="full", rows_per_step=8)
    alone = forecast_memory(job)["update"]
    spread = forecast_memory(replace(job, layout=Layout(4, is_sharded=True)))["update"]
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(spread, part) == getattr(alone, part) // 4
    # The embeddings and two layers are whole for a while, in bf16.
    assert spread.other == memory.CPU_RUNTIME_BYTES + 2 * (2 * 1200 + 2 * LAYER_WEIGHTS)
    copies = forecast_memory(replace(job, layout=Layout(4)))["update"]
    assert copies.other == alone.other + 4 * PARAMETERS
    assert (copies.weights, copies.gradients, copies.optimizer) == (alone.weights, alone.gradients, alone.optimizer)


def test_training_that_does_not_fit_is_refused_with_sizes_and_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe({"episodes": {"max_tokens": 4000}, "training": {"dtype": "float32", "lora": {"rank": 4}}})
    job = make_job(dtype="float32", max_tokens=3000)
    needed = peak_bytes(job) - 4 * PARAMETERS

    def check(available: int | None) -> None:
        monkeypatch.setattr(planning, "available_bytes", lambda device: available)
        check_training_memory(recipe, CONFIG, row_tokens=3000, device=CPU)

    check(needed)
    check(None)
    with pytest.raises(BudgetError) as caught:
        check(needed - 1)
    less = planning.show_bytes(peak_bytes(job.changed("training", gradient_checkpointing=True)) - 4 * PARAMETERS)
    row = planning.show_bytes(peak_bytes(job.changed("episodes", max_tokens=2944)) - 4 * PARAMETERS)
    assert str(caught.value) == (
        f"training on rows of 3,000 tokens, beside the loaded model, needs {planning.show_bytes(needed)} on cpu, where "
        f"{planning.show_bytes(needed - 1)} are available. Set training.gradient_checkpointing=true ({less}) or "
        f"episodes.max_tokens=2944 ({row})."
    )
    with pytest.raises(BudgetError, match=r"where 0 B are available\. Set training\.gradient_checkpointing=true \([^)]*\)\.$"):
        check(0)
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"gradient_checkpointing": True})})
    with pytest.raises(BudgetError, match="No change of the recipe is enough: free memory, or take a smaller model"):
        check(0)


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe({"training": {"dtype": "float32", "lora": {"rank": 4}, "rows_per_step": 2}})
    job = make_job(dtype="float32", rows_per_step=2, max_tokens=300, layout=Layout(2))
    needed = 2 * (peak_bytes(job) - 4 * PARAMETERS)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(planning, "available_bytes", lambda device: needed - 1)
    with pytest.raises(BudgetError, match=r"^training on rows of 300 tokens in 2 processes, beside the loaded model, needs "):
        check_training_memory(recipe, CONFIG, row_tokens=300, device=CPU, num_processes=2)
    monkeypatch.setattr(planning, "available_bytes", lambda device: needed)
    check_training_memory(recipe, CONFIG, row_tokens=300, device=CPU, num_processes=2)


def test_processes_that_share_rows_need_memory_for_their_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"dtype": "float32", "lora": {"rank": 4}, "rows_per_step": 2}
    sharing = {"fsdp": True, "parallelism_config": {"dp_shard_size": 2, "cp_size": 4}}
    shared, whole = (parse_recipe({"training": training | {"trainer": trainer}}) for trainer in (sharing, {"fsdp": True}))
    # On GPUs, where the model comes after the check.
    layout, rows = Layout(8, is_sharded=True, context_parallel=4), {"rows_per_step": 2, "max_tokens": 3000}
    needed = peak_bytes(replace(make_job(dtype="float32", layout=layout, **rows), on_cpu=False))
    check = partial(check_training_memory, config=CONFIG, row_tokens=3000, device=torch.device("cuda"), num_processes=8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(planning, "available_bytes", lambda device: needed)
    check(shared)
    with pytest.raises(BudgetError, match=r"^training on rows of 3,000 tokens needs "):
        check(whole.model_copy(update={"training": whole.training.model_copy(update={"rows_per_step": 8})}))
    monkeypatch.setattr(planning, "available_bytes", lambda device: needed - 1)
    with pytest.raises(BudgetError, match=rf"needs {re.escape(planning.show_bytes(needed))} on cuda, where "):
        check(shared)


def test_a_run_that_does_not_fit_writes_nothing(
    tiny_model_folder: Callable[..., Path], suite_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tiny_model_folder("llama"), suite_folder(), tmp_path / "run")
    monkeypatch.setattr(planning, "available_bytes", lambda device: 1_000_000)
    monkeypatch.setattr(runs, "train_model", lambda *arguments, **options: pytest.fail("it was trained"))
    message = r"training on rows of 1\d\d tokens, beside the loaded model, needs 7\d MB on cpu, where 1 MB are available\. Set "
    with pytest.raises(BudgetError, match=message):
        runs.train(recipe)
    assert not (tmp_path / "run").exists()
