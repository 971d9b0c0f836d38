"""Hooks for schemathesis: half of the requests name things that exist, so that they come further than a 404."""

import json
import os
from contextlib import suppress
from typing import Any

import schemathesis

KNOWN: dict[str, list[str]] = json.loads(os.environ["MANYICL_KNOWN"])
MAX_NAME_CHARS = 64


def replace_known(given: Any, draw: int) -> Any:
    """A case with names of things that exist; a name that the document refuses stays, as its case is about being refused."""
    if isinstance(given, dict):
        # A job names the file it reads, and starts from `base` alone.
        for name in {"training_file"} if "training_file" in given else given.keys() & KNOWN.keys():
            is_allowed = isinstance(given[name], str) and 1 <= len(given[name]) <= MAX_NAME_CHARS
            if is_allowed and draw % 2:
                given[name] = KNOWN[name][draw // 2 % len(KNOWN[name])]
    return given


def draw_of(given: Any) -> int:
    """A number that depends on the case alone, so that runs repeat."""
    return sum(repr(given).encode())


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    return replace_known(path_parameters, draw_of(path_parameters))


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    return replace_known(body, draw_of(body))


@schemathesis.hook
def before_call(context: Any, case: Any, **options: Any) -> None:
    """A deadline of a moment is rightly answered with 504, which no case may get here."""
    with suppress(KeyError, TypeError, ValueError):  # Here, as `map_headers` is passed by in schemathesis' coverage phase (4.32).
        if 0 < float(case.headers["x-timeout-seconds"]) < 60:
            case.headers["x-timeout-seconds"] = "60"
