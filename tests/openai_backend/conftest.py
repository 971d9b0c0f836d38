"""A backend in front of a small server with a tiny model, and the engine that it must equal."""

from functools import partial

import pytest

from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine


@pytest.fixture(scope="module")
def loaded(tiny_loaded):
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def engine(loaded):
    return NativeEngine(loaded, Encoder(loaded.tokenizer), context_tokens=400)


@pytest.fixture
def serve(loaded):
    """Run a coroutine function with a started backend and the fake server behind it: serve("vllm", scenario)."""
    from openai_fixtures import run_openai_backend  # Needs the serve extra, without which these tests are skipped.

    return partial(run_openai_backend, loaded)
