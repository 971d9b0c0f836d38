"""Plans of training by hand for a tiny config: operations, time, cost and layouts, what is said and what is refused."""

import importlib.util
import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from manyicl import planning
from manyicl.config import parse_recipe
from manyicl.errors import ModelError, RecipeError, UserInputError
from manyicl.kernels import cpu_attention
from manyicl.modeling import add_lora, load_config
from manyicl.training_plan import (
    Layout,
    PlanRequest,
    check_training_memory,
    forecast_memory,
    memory,
    peak_bytes,
    plan_recipe,
    plan_training,
    plans,
    read_decoder,
    show_plan,
)
from manyicl.training_plan.jobs import ONE_DEVICE
from model_fixtures import write_recipe
from plan_fixtures import CONFIG, FEATURES, LAYER_WEIGHTS, PARAMETERS, make_job

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "how-to" / "plan-a-run.md"
# Its memory takes no time.
DEVICE = plans.Device("test", 1e6, math.inf, 10**9, 2.0, plans.Shares(0.5, 0.5, 0.5, 0.5))


def test_parameters_are_those_of_a_real_model(tiny_model: Callable[..., Any]) -> None:
    for architecture, overrides in (("llama", {}), ("mistral", {"tie_word_embeddings": True}), ("gemma", {})):
        model = tiny_model(architecture, **overrides)
        decoder = read_decoder("tiny", model.config)
        assert decoder.num_parameters == sum(weight.numel() for weight in model.parameters())
        for lora in ({"rank": 4}, {"rank": 8, "targets": ["q_proj", "down_proj"]}):
            job = replace(make_job(lora=lora), decoder=decoder)
            adapted = add_lora(tiny_model(architecture, **overrides), job.recipe.training.lora, seed=0)
            assert job.num_trained == sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)


def test_a_recipes_own_sharing_is_planned(config_folder: Path) -> None:
    trainer = {"fsdp": True, "parallelism_config": {"dp_shard_size": 2, "cp_size": 4}}
    recipe = parse_recipe({"model": str(config_folder), "training": {"trainer": trainer, "rows_per_step": 2}})
    assert plan_recipe(recipe, PlanRequest("L4", Layout(8))).job.layout == Layout(8, True, 4)
    assert plan_recipe(recipe, PlanRequest("L4", Layout(8, context_parallel=8))).job.layout == Layout(8, True, 8)
    plain = parse_recipe({"model": str(config_folder)})
    assert plan_recipe(plain, PlanRequest("L4", Layout(4, True, 4))).job.layout == Layout(4, True, 4)
    for size in ("four", 0):
        wrong = parse_recipe({"training": {"trainer": {"parallelism_config": {"cp_size": size}}}})
        with pytest.raises(RecipeError, match=rf"parallelism_config\.cp_size = {size!r}\. Give a whole number from 1\."):
            plan_recipe(wrong, PlanRequest("L4", Layout(8), shape="llama3-8b"))


def test_devices_that_share_a_row_divide_its_tokens() -> None:
    job = make_job()
    shared = replace(job, layout=Layout(4, context_parallel=4))
    assert (shared.tokens, shared.num_passes) == (50, 1)
    assert forecast_memory(shared)["loss"].activations * 4 == forecast_memory(job)["loss"].activations
    assert forecast_memory(shared)["loss"].logits * 4 == forecast_memory(job)["loss"].logits
    assert plan_training(shared, DEVICE).operations == plan_training(job, DEVICE).operations
    assert plan_training(shared, DEVICE).seconds_per_update * 4 == pytest.approx(plan_training(job, DEVICE).seconds_per_update)


@pytest.mark.parametrize(
    ("layout", "training", "message"),
    [
        (Layout(6, context_parallel=4), {}, r"6 device\(s\) cannot be put into groups of 4 that share a row\. Change --devices"),
        (Layout(8), {}, r"training\.rows_per_step = 1 is no multiple of 8, the rows that 8 device\(s\) feed at once"),
        (Layout(8, context_parallel=4), {"rows_per_step": 6, "rows_per_device": 2}, r"= 6 is no multiple of 4, the rows that"),
    ],
)
def test_rows_that_cannot_be_shared_out_are_refused(layout: Layout, training: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_training(make_job(layout=layout, **training), DEVICE)


def machine_benchmark() -> Any:
    """benchmarks/machine.py, which is no package."""
    path = ROOT / "benchmarks" / "machine.py"
    spec = importlib.util.spec_from_file_location("machine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("training", [{"rows_per_step": 3}, {"tune": "full"}, {"gradient_checkpointing": True}])
def test_operations_are_those_of_the_benchmarks(training: dict[str, Any]) -> None:
    job = make_job(**training)
    rows = training.get("rows_per_step", 1)
    rank = None if job.is_full else 4
    expected = machine_benchmark().training_operations(CONFIG, [200] * rows, targets=20 * rows, lora_rank=rank)
    assert plan_training(job, DEVICE).operations == expected


def test_time_and_cost_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "is_available", lambda: False)
    job = make_job(rows_per_step=2)
    linear = 4 * (200 * 3 * LAYER_WEIGHTS + 20 * 12 * 100) + 6 * 200 * 3 * 4 * FEATURES
    attention = 6 * 200 * 200 * 3 * 24
    device = replace(DEVICE, shares=plans.Shares(linear=0.5, attention=0.1, masked=0.05, repeated=0.8))
    seconds = 2 * (linear / 0.5 + attention / 0.1) / 1e6
    plan = plan_training(job, device)
    assert plan.seconds_per_update == pytest.approx(seconds)
    assert plan.tokens_per_second == pytest.approx(400 / seconds)
    assert plan.hours == pytest.approx(10 * seconds / 3600)
    assert plan.cost == pytest.approx(2.0 * plan.hours)
    again = plan_training(make_job(rows_per_step=2, gradient_checkpointing=True), device)
    forward = 2 * (2 * 200 * 3 * (LAYER_WEIGHTS + 4 * FEATURES) + attention / 3) / 0.8 / 1e6
    assert again.seconds_per_update == pytest.approx(seconds + forward)
    assert again.operations == plan.operations
    masked = plan_training(make_job(rows_per_step=2, rows_per_device=2), device)
    assert masked.seconds_per_update == pytest.approx(seconds + 2 * (2 * attention / 0.05 - attention / 0.1) / 1e6)
    monkeypatch.setattr(cpu_attention, "is_available", lambda: True)  # Our kernel keeps padded and packed rows apart itself.
    assert plan_training(make_job(rows_per_step=2, rows_per_device=2), device).seconds_per_update == pytest.approx(seconds)
    # More than 512 targets: all chunks of logits are computed again.
    long, chunk = make_job(max_tokens=6000), 2 * 600 * 12 * 100
    whole = replace(long, decoder=replace(long.decoder, keeps_logits=True))
    difference = plan_training(long, device).seconds_per_update - plan_training(whole, device).seconds_per_update
    assert difference == pytest.approx(chunk / 0.8 / 1e6, rel=1e-3)


@pytest.mark.parametrize(
    ("training", "layout", "weights", "weight_bytes"),
    [
        # AdamW reads four numbers and writes three; the norm reads one; clipping reads and writes one.
        ({}, ONE_DEVICE, 12 * FEATURES, 40),
        ({"rows_per_step": 3}, ONE_DEVICE, 12 * FEATURES, 40 + 2 * 12),
        ({"tune": "full"}, ONE_DEVICE, PARAMETERS, 40 + 12),
        ({"tune": "full", "rows_per_step": 3}, ONE_DEVICE, PARAMETERS, 40 + 3 * 12 + 2 * 12),
        ({"tune": "full", "dtype": "float32"}, ONE_DEVICE, PARAMETERS, 40),
        ({"tune": "full", "rows_per_step": 2}, Layout(2), PARAMETERS, 40 + 12),
        ({"tune": "full", "rows_per_step": 2}, Layout(2, is_sharded=True), PARAMETERS / 2, 40 + 12),
    ],
)
def test_reading_and_writing_trained_weights_takes_time(
    training: dict[str, Any], layout: Layout, weights: float, weight_bytes: int
) -> None:
    job = make_job(layout=layout, **training)
    slow = replace(DEVICE, memory_rate=2e3)
    seconds = weights * weight_bytes / 2e3
    assert plans.weight_seconds(job, slow) == pytest.approx(seconds)
    plan = plan_training(job, slow)
    assert plan.seconds_per_update == pytest.approx(plan_training(job, DEVICE).seconds_per_update + seconds)
    line = f"            {seconds:.2g} s of it for trained weights, at 2e+03 bytes/s\n"
    assert (line in show_plan(plan)) is job.is_full  # Those of adapters are few.


def test_a_plan_says_whether_it_fits() -> None:
    job = make_job()
    peak = peak_bytes(job)
    fitting, short = (plan_training(job, replace(DEVICE, memory_bytes=limit)) for limit in (peak, peak - 1))
    assert (fitting.fits, short.fits, plan_training(job, replace(DEVICE, memory_bytes=None)).fits) == (True, False, True)
    assert "warning" not in show_plan(fitting)
    less = planning.show_bytes(peak_bytes(make_job(gradient_checkpointing=True)))
    row = make_job(max_tokens=128)
    assert show_plan(short).splitlines()[-3:] == [
        "warning: does not fit. One change would need:",
        f"  training.gradient_checkpointing=true  {less:>10}",
        f"  episodes.max_tokens=128               {planning.show_bytes(peak_bytes(row)):>10}",
    ]
    nothing = plan_training(make_job(gradient_checkpointing=True), replace(DEVICE, memory_bytes=0))
    assert show_plan(nothing).splitlines()[-1] == "warning: does not fit. Take larger devices, or more of them."


def test_what_is_suggested_needs_less() -> None:
    job = make_job(layout=Layout(4), tune="full", rows_per_device=2, rows_per_step=8, max_tokens=4000)
    limit = peak_bytes(job) - 1_000_000
    changes = memory.suggest_changes(job, limit) | plans._suggest_layouts(job)
    assert [words.partition("=")[0] for words in changes] == [
        "training.gradient_checkpointing",
        "training.rows_per_device",
        "episodes.max_tokens",
        "--fsdp",
        "--context-parallel 2",
    ]
    assert all(peak_bytes(changed) < peak_bytes(job) for changed in changes.values())
    (longest,) = (changed.recipe.episodes.max_tokens for words, changed in changes.items() if "max_tokens" in words)
    assert longest % 128 == 0
    assert peak_bytes(job.changed("episodes", max_tokens=longest)) <= limit
    assert peak_bytes(job.changed("episodes", max_tokens=longest + 128)) > limit
    assert memory.suggest_changes(make_job(gradient_checkpointing=True), 0) == {}


@pytest.fixture
def config_folder(tmp_path: Path) -> Path:
    """A folder with a config.json and nothing else."""
    CONFIG.save_pretrained(tmp_path / "sizes")
    assert [path.name for path in (tmp_path / "sizes").iterdir()] == ["config.json"]
    return tmp_path / "sizes"


def test_a_config_without_weights_is_enough(config_folder: Path) -> None:
    recipe = parse_recipe({"model": str(config_folder), "episodes": {"max_tokens": 200}})
    plan = plan_recipe(recipe, PlanRequest(device="l4", layout=Layout(1)))
    assert (plan.job.decoder.num_parameters, plan.device.name, plan.job.dtype) == (PARAMETERS, "L4", torch.bfloat16)
    assert plan.job.decoder.shape == read_decoder("tiny", CONFIG).shape
    assert plan.moments["loss"].other == memory.GPU_RUNTIME_BYTES


def test_the_config_of_an_adapter_is_its_bases(tmp_path: Path, config_folder: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (folder / "manyicl.json").write_text(json.dumps({"base": str(config_folder), "note": ""}))
    assert load_config(folder).hidden_size == 12


def test_a_model_that_cannot_be_reached_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nobody/no-such-model: its config cannot be read: .*a published shape \(--shape\)"):
        plan_recipe(parse_recipe({"model": "nobody/no-such-model"}), PlanRequest(device="H100"))
    with pytest.raises(ModelError, match="holds no model"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"its config cannot be read: .*Give `default`, a folder with a config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (PlanRequest(device="H10"), r"--device 'H10' is not known\. The nearest is 'H100' \(known: H100, H200, A100, L4, cpu\)"),
        (PlanRequest(device="A100-80GB"), r"The nearest is 'A100'"),
        (
            PlanRequest("H100", shape="llama-8b"),
            r"--shape 'llama-8b' is not known\. The nearest is 'llama3-8b' \(known: llama3-8b,",
        ),
    ],
)
def test_unknown_devices_and_shapes_name_the_nearest(request_: PlanRequest, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        plan_recipe(parse_recipe({}), request_)


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("mistral-7b", 7_241_732_096),
        ("gemma-7b", 8_537_680_896),
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(shape: str, parameters: int) -> None:
    plan = plan_recipe(parse_recipe({}), PlanRequest("H200", shape=shape))
    assert plan.job.decoder.num_parameters == parameters


def test_models_of_another_kind_are_refused_in_a_plan_and_trained_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = transformers.MixtralConfig(num_hidden_layers=2, num_key_value_heads=4, num_attention_heads=4, hidden_size=16)
    experts.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="mixtral has num_local_experts = 8"):
        plan_recipe(parse_recipe({"model": str(tmp_path)}), PlanRequest("H100"))
    monkeypatch.setattr(planning, "available_bytes", lambda device: 0)
    check_training_memory(parse_recipe({}), experts, row_tokens=100, device=CPU)


def test_this_machine_is_measured(config_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "available_bytes", lambda device: 123)
    ticks = iter(range(100))
    monkeypatch.setattr(plans.time, "perf_counter", lambda: float(next(ticks)))
    recipe = parse_recipe({"model": str(config_folder), "training": {"dtype": "float32"}})
    plan = plan_recipe(recipe, PlanRequest(price_per_hour=1.5, efficiency=0.3))
    # Three passes of a second each, of 2,048 tokens through the linear layers of one decoder layer; and three copies.
    rates = 2 * 2048 * LAYER_WEIGHTS, 2 * 4 * 2**25
    assert plan.device == plans.Device("cpu", *rates, 123, 1.5, plans.Shares(0.3, 0.3, 0.3, 0.3))
    assert plan.job.on_cpu
    assert not plan.fits


def test_the_command_prints_a_plan(run_cli: Callable[..., tuple[int, str, str]], config_folder: Path, tmp_path: Path) -> None:
    recipe = parse_recipe({"model": str(config_folder), "episodes": {"max_tokens": 200}, "training": {"num_steps": 10}})
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    options = ("--device", "h100", "--devices", 8, "--fsdp", "--context-parallel", 4, "--price", 2.5, "--efficiency", 0.25)
    code, output, _ = run_cli("plan", path, "training.rows_per_step=4", "training.lora.rank=4", *options, "--targets", 0.05)
    assert code == 0
    job = replace(make_job(rows_per_step=4, layout=Layout(8, True, 4)), target_share=0.05, on_cpu=False)
    job = replace(job, decoder=replace(job.decoder, name=str(config_folder)))
    device = replace(plans.GPUS["H100"], price_per_hour=2.5, shares=plans.Shares(0.25, 0.25, 0.25, 0.25))
    plan = plan_training(job, device)
    assert output == show_plan(plan) + "\n"
    shown = {line.split()[0]: line for line in output.splitlines() if line}
    assert shown["model"] == f"model       {config_folder}: {PARAMETERS:,} parameters, {12 * FEATURES:,} trained (LoRA of rank 4)"
    assert shown["devices"] == "devices     8 x H100, FSDP, 4 share a row, bfloat16"
    assert shown["rows"] == "rows        200 tokens, 5% of them targets (--targets, assumed);"
    assert shown["memory"].split() == ["memory", "of", "one", "device", "loss", "layers", "update"]
    for part in ("weights", "gradients", "optimizer", "activations", "logits", "other", "total"):
        values = [planning.show_bytes(getattr(parts, part)) for parts in plan.moments.values()]
        assert shown[part].split() == [part, *" ".join(values).split()]
    assert shown["peak"] == f"peak        {planning.show_bytes(plan.peak_bytes)} of 80 GB"
    assert shown["operations"] == f"operations  {plan.operations:.3g} an update"
    assert "\n            25% are reached, as given\n" in output
    assert shown["cost"].endswith("at $2.50 a device and hour, as given")
    assumed = run_cli("plan", path, "--device", "A100")[1]
    assert "\n            40% are reached, an assumption (--efficiency)\n" in assumed
    assert assumed.endswith("at $1.80 a device and hour, an assumption (--price)\n")
    on_cpu = show_plan(
        plan_training(job, replace(DEVICE, name="cpu", memory_bytes=None, shares=plans.CPU_SHARES, price_per_hour=0.0))
    )
    assert re.search(
        r"\n            \d+% \(linear\), \d+% \(attention\), .* are reached, as measured on one machine \(--efficiency\)\n",
        on_cpu,
    )
    assert on_cpu.endswith("at $0.00 a device and hour, an assumption (--price)")


def test_a_plan_of_too_long_rows_says_so(
    run_cli: Callable[..., tuple[int, str, str]], config_folder: Path, tmp_path: Path
) -> None:
    recipe = parse_recipe({"model": str(config_folder), "episodes": {"max_tokens": 5000}})
    code, output, _ = run_cli("plan", write_recipe(tmp_path / "recipe.yaml", recipe), "--device", "L4")
    assert code == 0
    assert output.splitlines()[-1] == f"warning: rows of 5,000 tokens are longer than the 4,096 positions of {config_folder}."
    code, output, errors = run_cli("plan", tmp_path / "recipe.yaml", "--device", "L40")
    assert (code, output) == (2, "")
    assert errors == "error: --device 'L40' is not known. The nearest is 'L4' (known: H100, H200, A100, L4, cpu).\n"


def test_planning_loads_no_weights(config_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", lambda *arguments, **options: pytest.fail("weights"))
    plan_recipe(parse_recipe({"model": str(config_folder)}), PlanRequest("A100"))


def printed_plans() -> list[tuple[list[str], str]]:
    """Commands of the page whose output stands below them, as arguments, with that output."""
    found = []
    for block in re.findall(
        r"^```\n\$ (manyicl plan .*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    ):
        command, output = re.split(r"(?<!\\)\n", block, maxsplit=1)
        found.append((shlex.split(command.replace("\\\n", " "))[1:], output))
    return found


@pytest.mark.parametrize("number", range(2))
def test_the_page_shows_what_the_command_prints(
    run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.chdir(ROOT)
    assert len(printed_plans()) == 2
    arguments, shown = printed_plans()[number]
    assert run_cli(*arguments)[:2] == (0, shown)
