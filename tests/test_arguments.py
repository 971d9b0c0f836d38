"""TrainingArguments of a recipe: what becomes of its keys, what may stand under training.trainer, and what is refused."""

import json

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from manyicl import arguments, dtypes
from manyicl.arguments import context_parallel_size, training_arguments
from manyicl.config import TrainingConfig
from manyicl.errors import ModelError, RecipeError


def test_float32_and_lora_runs_are_not_under_autocast(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "resolve_dtype", lambda name: torch.float32 if name == "float32" else torch.bfloat16)
    for tune, dtype, expected in (("full", "float32", False), ("full", "auto", True), ("lora", "bfloat16", False)):
        config = TrainingConfig.model_validate({"tune": tune, "dtype": dtype})
        assert training_arguments(config, tmp_path, seed=0, validate=False).bf16 is expected


def test_bfloat16_is_refused_where_the_processor_lacks_it(tmp_path, monkeypatch):
    monkeypatch.setattr(dtypes, "multiplies_in_bfloat16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = TrainingConfig.model_validate({"tune": "full", "dtype": "bfloat16"})
    with pytest.raises(ModelError, match=r"no bfloat16 .*\. Use dtype float32"):
        training_arguments(config, tmp_path, seed=0, validate=False)
    auto = TrainingConfig.model_validate({"tune": "full", "dtype": "auto"})
    assert not training_arguments(auto, tmp_path, seed=0, validate=False).bf16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows_per_step": 3, "rows_per_device": 2}, r"rows_per_step = 3 is no multiple of 2"),
        ({"rows_per_step": 1, "rows_per_device": 4}, r"rows_per_step = 1 is no multiple of 4"),
        ({"trainer": {"warmup_stepz": 3}}, "no 'warmup_stepz'; the nearest is 'warmup_steps'"),
        ({"trainer": {"max_steps": 3}}, r"sets 'max_steps', for which a recipe has a key of its own: training\.num_steps"),
        ({"trainer": {"save_only_model": True}}, "sets 'save_only_model', with which a run could not be resumed exactly"),
        ({"schedule": "zigzag"}, "zigzag is not a valid SchedulerType, please select one of .*cosine"),
        ({"report_to": ["notepad"]}, "notepad is not supported, only .*tensorboard"),
        ({"trainer": {"optim": "magic"}}, "magic is not a valid OptimizerNames"),
    ],
)
def test_values_that_cannot_be_used_are_recipe_errors(tmp_path, fields, message):
    with pytest.raises(RecipeError, match=message):
        training_arguments(TrainingConfig.model_validate(fields), tmp_path / "checkpoints", seed=0, validate=False)
    assert not (tmp_path / "checkpoints").exists()


def test_processes_share_the_rows_of_an_update(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = TrainingConfig.model_validate({"rows_per_step": 8, "rows_per_device": 2})
    assert arguments._passes_per_step(config) == 2
    with pytest.raises(RecipeError, match=r"rows_per_step = 1 is no multiple of 2, the rows that 2 process\(es\)"):
        arguments._passes_per_step(TrainingConfig.model_validate({}))


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments.TrainingArguments, "n_gpu", 2)
    with pytest.raises(RecipeError, match=r"2 GPUs are visible to one process\. Start one process each"):
        training_arguments(TrainingConfig.model_validate({}), tmp_path, seed=0, validate=False)


def test_more_processes_than_rows_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RecipeError, match=r"rows_per_step = 2 is no multiple of 4, the rows that 4 process\(es\) of"):
        arguments._passes_per_step(TrainingConfig.model_validate({"rows_per_step": 2}))


def test_processes_that_share_a_row_count_once(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    shared = {"fsdp": True, "parallelism_config": {"dp_shard_size": 2, "cp_size": 4}}
    config = TrainingConfig.model_validate({"rows_per_step": 6, "trainer": shared})
    assert context_parallel_size(config) == 4
    assert arguments._passes_per_step(config) == 3
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(RecipeError, match=r"6 process\(es\) cannot share rows in groups of parallelism_config\.cp_size = 4"):
        arguments._passes_per_step(config)


def test_what_stands_under_trainer_reaches_training_arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "_check_sharing", lambda training: None)
    options = {
        "fsdp": True,
        "fsdp_config": {"reshard_after_forward": False, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        "parallelism_config": {"dp_shard_size": 1},
        "ddp_timeout": 77,
        "torch_empty_cache_steps": 3,
    }
    config = TrainingConfig.model_validate({"trainer": options})
    made = training_arguments(config, tmp_path, seed=0, validate=False)
    assert made.fsdp is True
    assert made.fsdp_plugin_args["fsdp_version"] == 2
    assert made.fsdp_plugin_args["reshard_after_forward"] is False
    assert made.fsdp_plugin_args["transformer_cls_names_to_wrap"] == "LlamaDecoderLayer"
    assert made.fsdp_plugin_args["state_dict_type"] == "FULL_STATE_DICT"
    assert (made.parallelism_config.dp_shard_size, made.parallelism_config.cp_size) == (1, 1)
    assert (made.ddp_timeout, made.torch_empty_cache_steps) == (77, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"fsdp": True},
        {"fsdp": "full_shard"},
        {"deepspeed": {"zero_optimization": {"stage": 2}}},
        {"parallelism_config": {"cp_size": 2}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_sharing_that_processors_would_pass_over_in_silence_is_refused(tmp_path, monkeypatch, options):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name = next(iter(options))
    message = rf"training\.trainer\.{name} is set, but Accelerate shares models out over GPUs only, and this machine has none"
    with pytest.raises(RecipeError, match=message):
        training_arguments(TrainingConfig.model_validate({"trainer": options}), tmp_path, seed=0, validate=False)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG"])
def test_sharing_asked_for_by_accelerate_launch_is_refused_as_well(tmp_path, monkeypatch, variable):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(
        RecipeError, match=rf"{variable} \(accelerate launch\) is set, but Accelerate shares models out over GPUs"
    ):
        training_arguments(TrainingConfig.model_validate({}), tmp_path, seed=0, validate=False)
    monkeypatch.setenv(variable, "false")
    training_arguments(TrainingConfig.model_validate({}), tmp_path, seed=0, validate=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp": True}, r"training\.trainer\.fsdp is set, but this is the only process\. Start one per GPU"),
        ({"parallelism_config": {"cp_size": 2}}, "parallelism_config is set, but this is the only process"),
    ],
)
def test_sharing_with_one_process_is_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RecipeError, match=message):
        training_arguments(TrainingConfig.model_validate({"trainer": options}), tmp_path, seed=0, validate=False)


def test_context_parallelism_needs_fsdp(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = TrainingConfig.model_validate({"trainer": {"parallelism_config": {"cp_size": 2}}})
    with pytest.raises(RecipeError, match=r"cp_size needs training\.trainer\.fsdp: true beside it"):
        arguments._check_sharing(config)
    arguments._check_sharing(TrainingConfig.model_validate({"trainer": config.trainer | {"fsdp": True}}))


@pytest.mark.parametrize(
    "sizes", [{"tp_size": 2}, {"cp_size": 2, "cp_backend": "torch"}, {"cp_size": "two"}, {"cp_size": 0}, "cp", [2]]
)
def test_parallelism_that_is_not_offered_is_refused(sizes):
    with pytest.raises(RecipeError, match=r"only a mapping of dp_replicate_size, dp_shard_size, cp_size to whole numbers from 1"):
        context_parallel_size(TrainingConfig.model_validate({"trainer": {"parallelism_config": sizes}}))


def test_deepspeed_must_give_the_weights_back(tmp_path):
    name = "stage3_gather_16bit_weights_on_model_save"
    for stage, gathers, is_refused in ((3, None, True), (3, False, True), (3, True, False), (2, None, False)):
        section = {"stage": stage} | ({} if gathers is None else {name: gathers})
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps({"zero_optimization": section}))
        config = HfDeepSpeedConfig(str(path))
        if is_refused:
            with pytest.raises(
                RecipeError, match=rf"without zero_optimization\.{name}: true the tuned weights could not be saved"
            ):
                arguments._check_deepspeed(config)
        else:
            arguments._check_deepspeed(config)
