"""Which process this is, and what is said when another cannot be reached; several real ones run in equivalence/."""

import pytest
import torch
from torch import distributed

from manyicl.errors import ManyICLError, UserInputError
from manyicl.process_group import (
    gather_from_processes,
    gather_weights,
    join_processes,
    launch_name,
    leave_processes,
    naming_lost_processes,
    place_among_processes,
)


@pytest.fixture
def place(monkeypatch):
    """Sets RANK and WORLD_SIZE, None for absent."""

    def set_to(rank, size):
        for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("rank", "size", "expected"), [(None, None, (0, 1)), ("0", "1", (0, 1)), (None, "1", (0, 1)), ("3", "4", (3, 4))]
)
def test_the_place_is_read_from_the_environment(place, rank, size, expected):
    place(rank, size)
    assert place_among_processes() == expected


@pytest.mark.parametrize(
    ("rank", "size"), [(None, "2"), ("2", "2"), ("1", None), ("-1", "2"), ("one", "2"), ("0", "two"), ("0", "0")]
)
def test_a_place_that_is_none_is_refused(place, rank, size):
    place(rank, size)
    with pytest.raises(UserInputError, match=r"which is no place among processes\. Start them with torchrun"):
        place_among_processes()


def test_processes_of_one_launch_have_its_name(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launch_name() == ""
    monkeypatch.setenv("MASTER_ADDR", "node")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert launch_name() == "node/29500"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    assert launch_name() == "job/node/29500"


def test_a_process_alone_waits_for_none(place):
    place(None, None)
    join_processes(1)
    assert not distributed.is_initialized()
    assert gather_from_processes({"a": 1}) == [{"a": 1}]
    assert gather_weights(torch.nn.Linear(2, 2), trained_only=False) is None
    leave_processes()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4\nmore"),
        distributed.DistNetworkError("The client socket has timed out"),
    ],
    ids=["gloo", "store"],
)
def test_a_lost_process_is_named(place, error):
    place("1", "2")
    with (
        pytest.raises(ManyICLError, match=r"^process 1 of 2 cannot reach the others: .*(by peer \[.*\]:4|timed out)\)\. Look at"),
        naming_lost_processes(),
    ):
        raise error


@pytest.mark.parametrize(("size", "error"), [("2", RuntimeError("size mismatch")), ("1", RuntimeError("gloo"))])
def test_other_errors_are_left_alone(place, size, error):
    place("0", size)
    with pytest.raises(RuntimeError) as raised, naming_lost_processes():
        raise error
    assert raised.value is error
