"""A native backend around a tiny model."""

from functools import partial

import pytest

from backend_fixtures import Passes, run_backend
from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine


@pytest.fixture(scope="module")
def loaded(tiny_loaded):
    return tiny_loaded("llama")


@pytest.fixture
def engine(loaded):
    return NativeEngine(loaded, Encoder(loaded.tokenizer))


@pytest.fixture
def passes(loaded):
    passes = Passes(loaded.model)
    yield passes
    passes.close()


@pytest.fixture
def serve(engine, tmp_path):
    """Run a coroutine function with a started backend: serve(scenario, engine=…, max_queue=…)."""
    return partial(run_backend, engine=engine, folder=tmp_path / "prefixes")
