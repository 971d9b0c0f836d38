"""The processes of one run: which of them this is, whether they agree, and what they say when one is lost.

torchrun, `accelerate launch` or a scheduler starts the same command several times; RANK and WORLD_SIZE in the environment say
which process each is. Process 0 is the main one. Evaluation needs no more than that; training joins its processes in torch's
process group, in which no wait for another lasts longer than a limit, and a process that was killed is noticed at once.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from manyicl.errors import ManyICLError, UserInputError

# As in torch and transformers.
DEFAULT_TIMEOUT_SECONDS = 1800

Value = TypeVar("Value")


def place_among_processes() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are; (0, 1) for one that was started alone.

    Raises:
        UserInputError: RANK and WORLD_SIZE do not say so.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    rank = os.environ.get("RANK", "0" if size == "1" else "")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise UserInputError(
            f"the environment has RANK={rank!r} and WORLD_SIZE={size!r}, which is no place among processes. Start them with "
            "torchrun, set both (RANK from 0 to WORLD_SIZE - 1), or unset both."
        )
    return int(rank), int(size)


def launch_name() -> str:
    """Text that processes started by one torchrun have in common, and no others; empty for those started one by one."""
    return "/".join(os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")).strip("/")


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turn a failure to reach the other processes inside the block into an error that says so; also a decorator."""
    try:
        yield
    except RuntimeError as error:
        _, size = place_among_processes()
        # gloo raises bare RuntimeErrors (torch 2.8 to 2.13), NCCL and the store that processes meet at raise DistErrors.
        if size == 1 or not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            raise
        raise ManyICLError(_lost(str(error))) from error


def _lost(reason: str) -> str:
    rank, size = place_among_processes()
    return (
        f"process {rank} of {size} cannot reach the others: one was stopped, or did not come in time "
        f"({reason.strip().splitlines()[0]}). Look at what they said, and start all of them again, a training with --resume."
    )


@naming_lost_processes()
def join_processes(timeout_seconds: float) -> None:
    """Meet the other processes, on a machine without GPUs; a wait for one of them ends after `timeout_seconds`.

    Those with GPUs are joined by accelerate, which takes the limit from TrainingArguments for them alone (transformers 5.23).

    Raises:
        ManyICLError: one did not come.
    """
    _, size = place_among_processes()
    if size == 1 or torch.cuda.is_available() or distributed.is_initialized() or "MASTER_ADDR" not in os.environ:
        return
    distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds))


@naming_lost_processes()
def leave_processes() -> None:
    """Wait for the others and end the process group that training has joined, if any; a process that exits without may abort."""
    if _are_joined():
        distributed.barrier()
        distributed.destroy_process_group()


@naming_lost_processes()
def gather_from_processes(value: Value) -> list[Value]:
    """The value that each process gives, in their order, on all of them; every process must come here."""
    if not _are_joined():
        return [value]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def gather_weights(model: nn.Module, *, trained_only: bool) -> dict[str, Tensor] | None:
    """Whole weights by name of a model whose parameters are sharded (DTensor), in the main process's memory; empty in others.

    None for a model that each process holds whole. Every process must come here.

    Args:
        trained_only: Leave out frozen weights, as the base of an adapter.
    """
    if not _are_joined():
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.tensor import DTensor

    if not any(isinstance(weight, DTensor) for weight in model.parameters()):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights


def _are_joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
