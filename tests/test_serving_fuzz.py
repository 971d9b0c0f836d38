"""Requests made by schemathesis from the service's own OpenAPI document: no 5xx, and every answer is as it says.

`MANYICL_FUZZ_EXAMPLES` is the number of cases an address and phase; `make fuzz` takes enough for 20,000 in all.
"""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from manyicl.serving.keys import add_key
from manyicl.serving.settings import Limits, Settings
from manyicl.serving.store import Store
from serving_fixtures import CAPITALS, FakeBackend, plain_file, serving, wait_for
from test_serving_guard import Caller

# What a schema cannot say is refused with 400 all the same: two labels at least, a list of messages that ends with the user's.
EXCLUDED = "positive_data_acceptance"
# With its own list, schemathesis 4.32 takes a body that is refused with 413, for its length, for one that is accepted.
CONFIG = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 409, 413, 415]
"""
MANY_EXAMPLES = 1000


@pytest.mark.slow
def test_no_request_makes_the_service_fail_or_lie(tmp_path: Path) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    key = add_key(tmp_path / "keys.txt", "acme")
    limits = Limits(max_files=10**6, max_tasks=10**6, max_unfinished_jobs=10**6)
    settings = Settings(tmp_path / "data", api_keys=tmp_path / "keys.txt", limits=limits)
    num_examples = int(os.environ.get("MANYICL_FUZZ_EXAMPLES", "20"))
    with serving(settings, FakeBackend(tmp_path / "fake")) as address:
        call = Caller(address, key)
        file_id, job_id = call.make_model("tickets")
        capitals = call.upload(plain_file(CAPITALS))[1]["id"]
        call("POST", "/v1/fine_tuning/jobs", {"training_file": capitals, "suffix": "capitals"})
        wait_for(lambda: len(call("GET", "/v1/models")[1]["data"]) == 3)
        known = {
            "name": ["tickets", "capitals"],
            "model": ["tickets", "capitals", "base"],
            "file_id": [file_id],
            "job_id": [job_id],
        }
        known["training_file"] = [file_id, capitals]
        environment = os.environ | {
            "MANYICL_KNOWN": json.dumps(known),
            "SCHEMATHESIS_HOOKS": "serving_fuzz_hooks",
            "PYTHONPATH": str(Path(__file__).parent),
        }
        (tmp_path / "schemathesis.toml").write_text(CONFIG)
        command = [
            str(Path(sys.executable).with_name("st")),
            "run",
            f"{address}/openapi.json",
            "-H",
            f"Authorization: Bearer {key}",
        ]
        command += ["-n", str(num_examples), "--checks", "all", "--exclude-checks", EXCLUDED]
        command += ["--seed", "1", "--continue-on-failure", "--warnings", "off", "--suppress-health-check", "all"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        metrics = call("GET", "/metrics")[1].decode()
    assert schemathesis.__version__
    (tmp_path / "schemathesis.txt").write_text(done.stdout)
    # A failure shows its request, which may be megabytes long; the file holds all of it.
    assert done.returncode == 0, "\n".join(line[:500] for line in done.stdout.splitlines())[-30_000:]
    numbers = re.search(r"(\d+) generated", done.stdout)
    assert numbers is not None
    print(f"{numbers[1]} generated")
    assert int(numbers[1]) > (20_000 if num_examples >= MANY_EXAMPLES else 1000)
    statuses = set(re.findall(r'status="(\d+)"', metrics))
    assert {"200", "400", "401", "404"} <= statuses
    assert not any(status.startswith("5") for status in statuses)
    store = Store(settings)
    assert store.check() == []
    store.close()


def test_what_the_document_refuses_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("schemathesis")
    monkeypatch.setenv("MANYICL_KNOWN", json.dumps({"model": ["tickets", "base"], "training_file": ["file-1"]}))
    replace_known = import_module("serving_fuzz_hooks").replace_known
    assert [replace_known({"model": "x"}, draw) for draw in range(4)] == [
        {"model": "x"},
        {"model": "tickets"},
        {"model": "x"},
        {"model": "base"},
    ]
    for refused in ("", "x" * 65, None, 5, ["x"]):
        assert replace_known({"model": refused}, 1) == {"model": refused}
    assert replace_known({"training_file": "x" * 64, "model": "x"}, 1) == {"training_file": "file-1", "model": "x"}
    assert replace_known(["model"], 1) == ["model"]
