"""Operations, time and cost of a run on a device, and the plan as people read it.

Operations of an update are floating-point multiplications and additions, each counted:

    linear       4W a token (6W where all weights are trained), 4 or 6 · C · V a target, 6 a weight of adapters and token
    attention    6 · T² · H · D a row and layer, the causal half alone

What is computed again (layers under gradient checkpointing, chunks of logits) is counted in the time and not among the
operations that are needed. Their time is operations over the device's matrix rate, times the share of it that is reached. To it
comes that of reading and writing trained weights and what belongs to them, which is bytes over the rate of the device's memory:

    update       40 a trained weight: AdamW reads weight, gradient and two moments and writes three of them (28), the gradients'
                 norm reads them (4), clipping reads and writes them (8)
    pass         12 a trained weight where all are trained in bf16: its copy of 2 bytes is made from 4 (6), and its gradient of 4
                 from 2 (6); 12 where gradients of an earlier pass of the update are there to be added to

For GPUs rates and sizes are published ones and the share is an assumption. A processor's rates are measured when the plan is
made, in half a second each: matrix products at the model's own linear layers, and copying a tensor; the shares were measured
once (benchmarks/planning.py), on the default model with our kernels. The matrix rate is no upper bound: shares over 100% say
that a kernel is faster than small matrix products are. Transfers between devices, reading and tokenising count as nothing.

Letters: W weights of the linear layers, C hidden size, V vocabulary, T tokens of a row, H heads, D head size.
"""

import difflib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from manyicl import planning
from manyicl.config import Recipe
from manyicl.dtypes import resolve_dtype
from manyicl.errors import UserInputError
from manyicl.modeling import load_config
from manyicl.objective import CHUNK_POSITIONS
from manyicl.planning import show_bytes
from manyicl.training_plan.jobs import (
    MASTER_BYTES,
    ONE_DEVICE,
    PUBLISHED,
    TARGET_SHARE,
    Decoder,
    Layout,
    TrainingJob,
    read_decoder,
    read_layout,
)
from manyicl.training_plan.memory import MemoryParts, forecast_memory, peak_bytes, suggest_changes

_MEASURED_SECONDS = 0.5
_MEASURED_TOKENS = 2048
_MEASURED_PRODUCTS = 8e9  # Multiplications of a pass, at most: shapes of 70B models are measured with fewer tokens.
_COPIED_NUMBERS = 2**25  # More than caches hold.

# Bytes read and written for each trained weight; see the module.
_UPDATE_BYTES = 28 + 4 + 8
_CAST_BYTES = 12
_ADDED_BYTES = 12


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares of a device's matrix rate that training reaches, by kind of work.

    Attributes:
        linear: Products with matrices of the model and of adapters; the element-wise work between them is counted with it.
        attention: The causal half of the attention.
        masked: The whole square of the attention, under a mask.
        repeated: Forward passes made again in the backward pass, under gradient checkpointing.
    """

    linear: float
    attention: float
    masked: float
    repeated: float


GPU_SHARES = Shares(linear=0.4, attention=0.4, masked=0.4, repeated=0.4)
CPU_SHARES = Shares(linear=0.52, attention=1.05, masked=0.23, repeated=1.0)


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan knows of a device.

    Attributes:
        matrix_rate: Operations per second of dense bf16 matrix products.
        memory_rate: Bytes per second that are read from memory or written to it.
        memory_bytes: None where it is not known.
        price_per_hour: US dollars, an assumption.
    """

    name: str
    matrix_rate: float
    memory_rate: float
    memory_bytes: int | None
    price_per_hour: float
    shares: Shares = GPU_SHARES


# Rates (without sparsity) and sizes as NVIDIA publishes them, of SXM boards and the L4. Prices are assumptions.
GPUS = {
    "H100": Device("H100", 989e12, 3.35e12, 80_000_000_000, 3.00),
    "H200": Device("H200", 989e12, 4.8e12, 141_000_000_000, 4.00),
    "A100": Device("A100", 312e12, 2.039e12, 80_000_000_000, 1.80),
    "L4": Device("L4", 121e12, 0.3e12, 24_000_000_000, 0.80),
}


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A forecast of a run.

    Attributes:
        moments: Memory of one device at each moment, see `forecast_memory`.
        operations: Operations that an update needs, on all devices together.
        tokens_per_second: Of all devices together; rows are taken as full.
        cost: US dollars of all devices for the whole run.
    """

    job: TrainingJob
    device: Device
    moments: dict[str, MemoryParts]
    operations: int
    seconds_per_update: float
    tokens_per_second: float
    hours: float
    cost: float

    @property
    def peak_bytes(self) -> int:
        """Bytes of one device at its highest moment."""
        return max(parts.total for parts in self.moments.values())

    @property
    def fits(self) -> bool:
        """Whether the highest moment fits the device; true where its memory is not known."""
        return self.device.memory_bytes is None or self.peak_bytes <= self.device.memory_bytes


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What `manyicl plan` was asked for; see its options. None takes what the tables assume, and the recipe's own model."""

    device: str = "cpu"
    layout: Layout = ONE_DEVICE
    price_per_hour: float | None = None
    efficiency: float | None = None
    target_share: float = TARGET_SHARE
    shape: str | None = None


def plan_recipe(recipe: Recipe, request: PlanRequest) -> TrainingPlan:
    """The forecast of a recipe; reads the model's config, or takes a published shape in its place, and no weights.

    Raises:
        UserInputError: the device, the shape, the model or the layout is wrong.
    """
    devices: dict[str, Device | None] = {**GPUS, "cpu": None}
    device = _choose(request.device, devices, "device")
    if request.shape is not None:
        decoder = _choose(request.shape, PUBLISHED, "shape")
    else:
        decoder = read_decoder(recipe.model, load_config(recipe.model, rope_scaling=recipe.rope_scaling))
    dtype = torch.float32 if recipe.training.dtype == "float32" else torch.bfloat16
    dtype = resolve_dtype(recipe.training.dtype) if device is None else dtype
    asked, own = request.layout, read_layout(recipe, request.layout.num_devices)
    shared = asked.context_parallel if asked.context_parallel > 1 else own.context_parallel
    layout = Layout(asked.num_devices, asked.is_sharded or own.is_sharded, shared)
    job = TrainingJob(recipe, decoder, dtype, layout, request.target_share, on_cpu=device is None)
    chosen = _measure_processor(decoder, dtype) if device is None else device
    if request.price_per_hour is not None:
        chosen = replace(chosen, price_per_hour=request.price_per_hour)
    if request.efficiency is not None:
        chosen = replace(chosen, shares=Shares(*[request.efficiency] * 4))
    return plan_training(job, chosen)


def _choose(name: str, table: Mapping[str, Any], option: str) -> Any:
    """An entry of a table by its name in any case, or an error that names the nearest."""
    names = {each.lower(): each for each in table}
    if name.lower() not in names:
        nearest = names[difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.0)[0]]
        raise UserInputError(f"--{option} {name!r} is not known. The nearest is {nearest!r} (known: {', '.join(table)}).")
    return table[names[name.lower()]]


def _measure_processor(decoder: Decoder, dtype: torch.dtype) -> Device:
    """This machine: rates of matrix products at the model's own linear layers and of copying, and the memory available now."""
    weights = decoder.shape.weights_per_layer
    tokens = max(16, min(_MEASURED_TOKENS, int(_MEASURED_PRODUCTS / weights)))
    sizes = decoder.linear_sizes().values()
    pairs = [(torch.randn(tokens, size_in).to(dtype), torch.randn(size_out, size_in).to(dtype)) for size_in, size_out in sizes]
    products = _median_seconds(lambda: [torch.nn.functional.linear(rows, weight) for rows, weight in pairs])
    numbers, copy = torch.ones(_COPIED_NUMBERS), torch.zeros(_COPIED_NUMBERS)
    copying = _median_seconds(lambda: copy.copy_(numbers))
    rates = 2 * tokens * weights / products, 2 * numbers.nbytes / copying
    return Device("cpu", *rates, planning.available_bytes(torch.device("cpu")), 0.0, CPU_SHARES)


def _median_seconds(work: Callable[[], object]) -> float:
    """Seconds that some work takes, repeated for half a second."""
    seconds: list[float] = []
    while sum(seconds) < _MEASURED_SECONDS or len(seconds) < 3:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def plan_training(job: TrainingJob, device: Device) -> TrainingPlan:
    """The forecast of a job on devices of one kind.

    Raises:
        RecipeError: the devices or the rows cannot be shared out.
    """
    training = job.recipe.training
    moments, seconds = forecast_memory(job), forecast_seconds(job, device)
    hours = training.num_steps * seconds / 3600
    return TrainingPlan(
        job=job,
        device=device,
        moments=moments,
        operations=needed_operations(job),
        seconds_per_update=seconds,
        tokens_per_second=training.rows_per_step * job.recipe.episodes.max_tokens / seconds,
        hours=hours,
        cost=hours * job.layout.num_devices * device.price_per_hour,
    )


def needed_operations(job: TrainingJob) -> int:
    """Operations that an update needs on all devices together; nothing is computed again."""
    return sum(_row_operations(job).values()) * job.recipe.training.rows_per_step


def _row_operations(job: TrainingJob) -> dict[str, int]:
    """Operations that forward and backward pass of one row need, by kind of work."""
    shape, tokens = job.decoder.shape, job.recipe.episodes.max_tokens
    base = tokens * job.decoder.num_linear_weights + job.row_targets * shape.hidden_size * shape.vocabulary_size
    return {
        "linear": (6 if job.is_full else 4) * base + 6 * tokens * job.num_adapter_weights,
        "attention": 6 * tokens * tokens * shape.num_layers * shape.num_heads * shape.head_size,
    }


def _repeated_operations(job: TrainingJob) -> dict[str, int]:
    """Operations of one row that are done again in the backward pass: layers under checkpointing, chunks of logits."""
    shape, tokens = job.decoder.shape, job.recipe.episodes.max_tokens
    again = 2 if job.recipe.training.gradient_checkpointing else 0
    is_chunked = job.row_targets > CHUNK_POSITIONS and not job.decoder.keeps_logits
    head = 2 * job.row_targets * shape.hidden_size * shape.vocabulary_size if is_chunked else 0
    return {
        "linear": again * tokens * (job.decoder.num_linear_weights + job.num_adapter_weights) + head,
        "attention": again * tokens * tokens * shape.num_layers * shape.num_heads * shape.head_size,
    }


def forecast_seconds(job: TrainingJob, device: Device) -> float:
    """Seconds of an update, on all devices together.

    Raises:
        RecipeError: the devices or the rows cannot be shared out.
    """
    needed, repeated, shares = _row_operations(job), _repeated_operations(job), device.shares
    equivalent = needed["linear"] / shares.linear + repeated["linear"] / shares.repeated
    if job.has_mask:  # The unseen half of the scores is computed too.
        equivalent += 2 * (needed["attention"] + repeated["attention"]) / shares.masked
    else:
        equivalent += needed["attention"] / shares.attention + repeated["attention"] / shares.repeated
    products = job.recipe.training.rows_per_step * equivalent / device.matrix_rate / job.layout.num_devices
    return products + weight_seconds(job, device)


def weight_seconds(job: TrainingJob, device: Device) -> float:
    """Seconds of an update in which trained weights, gradients and moments are read and written, by all devices at once."""
    is_cast = job.is_full and job.dtype.itemsize < MASTER_BYTES
    weight = _UPDATE_BYTES + job.num_passes * _CAST_BYTES * is_cast + (job.num_passes - 1) * _ADDED_BYTES
    return job.num_trained / job.shards * weight / device.memory_rate


def show_plan(plan: TrainingPlan) -> str:
    """A plan as lines of text: model, devices, rows, memory by part and moment, operations, speed, time and cost."""
    job, device, training = plan.job, plan.device, plan.job.recipe.training
    tuned = "all weights" if job.is_full else f"LoRA of rank {training.lora.rank}"
    saving = ", gradient checkpointing" if training.gradient_checkpointing else ""
    limit = "" if device.memory_bytes is None else f" of {show_bytes(device.memory_bytes)}"
    weights = f"{weight_seconds(job, device):.2g} s of it for trained weights, at {device.memory_rate:.3g} bytes/s"
    lines = [
        f"model       {job.decoder.name}: {job.decoder.num_parameters:,} parameters, {job.num_trained:,} trained ({tuned})",
        f"devices     {_describe_layout(job.layout, device)}, {str(job.dtype).removeprefix('torch.')}{saving}",
        f"rows        {job.recipe.episodes.max_tokens:,} tokens, {job.target_share:.0%} of them targets (--targets, assumed);",
        f"            {training.rows_per_step} an update, {training.rows_per_device} a pass, {job.num_passes} pass(es) an update",
        "",
        f"{'memory of one device':20}" + "".join(f"{name:>10}" for name in plan.moments),
        *(_memory_line(name, plan.moments) for name in (*(part.name for part in fields(MemoryParts)), "total")),
        "",
        f"peak        {show_bytes(plan.peak_bytes)}{limit}",
        f"operations  {plan.operations:.3g} an update",
        f"speed       {plan.tokens_per_second:,.0f} tokens/s, at {device.matrix_rate:.3g} operations/s a device, of which",
        f"            {_describe_shares(device.shares)}",
        f"time        {plan.seconds_per_update:.3g} s an update, {plan.hours:.3g} hours for {training.num_steps} updates",
        *([f"            {weights}"] if job.is_full else []),
        f"cost        ${plan.cost:,.2f}, at ${device.price_per_hour:,.2f} a device and hour, {_describe_price(device)}",
    ]
    return "\n".join(lines + _warnings(plan))


def _describe_layout(layout: Layout, device: Device) -> str:
    spread = "" if layout.num_devices == 1 else ", FSDP" if layout.is_sharded else ", data parallel"
    shared = f", {layout.context_parallel} share a row" if layout.context_parallel > 1 else ""
    return f"{layout.num_devices} x {device.name}{spread}{shared}"


def _describe_shares(shares: Shares) -> str:
    """Shares by kind of work, and where they come from."""
    if shares == CPU_SHARES:
        named = ", ".join(f"{getattr(shares, each.name):.0%} ({each.name})" for each in fields(Shares))
        return f"{named} are reached, as measured on one machine (--efficiency)"
    return f"{shares.linear:.0%} are reached, {'an assumption (--efficiency)' if shares == GPU_SHARES else 'as given'}"


def _describe_price(device: Device) -> str:
    known = GPUS.get(device.name)
    return "an assumption (--price)" if device.price_per_hour == (known.price_per_hour if known else 0.0) else "as given"


def _memory_line(name: str, moments: Mapping[str, MemoryParts]) -> str:
    return f"  {name:18}" + "".join(f"{show_bytes(getattr(parts, name)):>10}" for parts in moments.values())


def _warnings(plan: TrainingPlan) -> list[str]:
    """A line for each thing that would stop the run."""
    job, lines = plan.job, []
    tokens, positions = job.recipe.episodes.max_tokens, job.decoder.num_positions
    if positions is not None and tokens > positions:
        lines.append(f"warning: rows of {tokens:,} tokens are longer than the {positions:,} positions of {job.decoder.name}.")
    if not plan.fits and plan.device.memory_bytes is not None:
        changes = suggest_changes(job, plan.device.memory_bytes) | _suggest_layouts(job)
        lines.append(f"warning: does not fit. {'One change would need:' if changes else 'Take larger devices, or more of them.'}")
        lines += [f"  {words:38}{show_bytes(peak_bytes(changed)):>10}" for words, changed in changes.items()]
    return lines


def _suggest_layouts(job: TrainingJob) -> dict[str, TrainingJob]:
    """Layouts of the same devices that need less memory of each, by the option that asks for them."""
    layout, changes = job.layout, {}
    if layout.num_devices > 1 and not layout.is_sharded:
        changes["--fsdp"] = replace(job, layout=replace(layout, is_sharded=True))
    doubled = 2 * layout.context_parallel
    if layout.num_devices % doubled == 0:
        changes[f"--context-parallel {doubled}"] = replace(job, layout=replace(layout, context_parallel=doubled))
    return changes
