"""The development data beside the checkout, read as users read theirs; skipped where it is absent."""

import json
from pathlib import Path

import pytest

from manyicl.config import EpisodesConfig
from manyicl.encoding import Encoder
from manyicl.packing import build_row
from manyicl.tasks.checks import check_folder
from manyicl.tasks.readers import load_suite
from manyicl.tasks.task import Task, TaskSuite

DATA = Path(__file__).parents[2] / "shared" / "data"

pytestmark = pytest.mark.skipif(not (DATA / "SPLIT.json").is_file(), reason=f"{DATA} is absent")


@pytest.fixture(scope="module")
def suite() -> TaskSuite:
    return load_suite(DATA)


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict]:
    return {entry["name"]: entry for entry in json.loads((DATA / "MANIFEST.json").read_text(encoding="utf-8"))}


def test_roles_are_those_of_the_split(suite: TaskSuite) -> None:
    split = json.loads((DATA / "SPLIT.json").read_text(encoding="utf-8"))
    assert suite.meta_training == tuple(split["meta_training"])
    assert suite.validation == tuple(split["validation_tasks"])
    assert suite.held_out == tuple(split["held_out"])
    assert len(suite.tasks) == 26


def test_every_row_is_read_as_the_manifest_says(suite: TaskSuite, manifest: dict[str, dict]) -> None:
    for name, task in suite.tasks.items():
        entry = manifest[name]
        assert {"train": len(task.train), "test": len(task.test)} == entry["rows"], name
        assert task.family == entry["family"], name
        inferred = ["no", "yes"] if name == "boolq_short" else []
        assert list(task.labels) == (entry.get("labels") or inferred), name


def raw_rows(task: Task, split: str) -> list[dict]:
    text = (DATA / task.name / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def test_inputs_answers_and_accepted_answers_are_the_files_own(suite: TaskSuite) -> None:
    for task in suite.tasks.values():
        for split, examples in (("train", task.train), ("test", task.test)):
            for example, row in zip(examples, raw_rows(task, split), strict=True):
                answer = next(row[name] for name in ("label", "answer", "summary") if name in row)
                assert example.answer == answer
                assert {example.answer, *example.accepted} == {answer, *row.get("answers", []), *row.get("references", [])}
                shown = [row[name] for name in ("input", "premise", "hypothesis", "passage", "question") if name in row]
                assert all(text in example.input for text in shown)
                # What must not be shown is not: the rationale or the equation of a problem.
                assert not row.get("equation") or row["equation"] not in example.input
                assert not row.get("rationale") or row["rationale"] not in example.input


def test_choices_are_shown_and_hold_the_answer(suite: TaskSuite) -> None:
    task = suite.tasks["commonsense_qa"]
    assert (task.labels, task.is_choice, task.metric) == ((), True, "accuracy")
    for example in task.train + task.test:
        assert len(example.options) == 5
        assert example.input.endswith("\nChoices: " + "; ".join(example.options))


def test_the_data_has_no_errors_and_the_known_overlaps(suite: TaskSuite) -> None:
    findings = check_folder(DATA)
    assert [finding for finding in findings if finding.severity == "error"] == []
    pairs = {
        (finding.task, finding.message.split(" share text with ")[1].split(" ")[0])
        for finding in findings
        if "share" in finding.message
    }
    # Problems that two collections took from one source stand on both sides of the split.
    assert ("gsm8k", "asdiv") in pairs
    assert all(finding.source.startswith(str(DATA)) for finding in findings)


@pytest.mark.parametrize("format", ["plain", "chat"])
def test_rows_of_every_training_task_fit(suite: TaskSuite, byte_tokenizer, format: str) -> None:
    encoder = Encoder(byte_tokenizer, format=format)
    config = EpisodesConfig(max_tokens=8192)
    tasks = suite.select("meta_training")
    rows = [build_row(tasks, config=config, encoder=encoder, seed=0, index=index) for index in range(len(tasks))]
    assert {row.sequences[0].episode.task for row in rows} == set(suite.meta_training)
    for row in rows:
        assert row.num_tokens <= 8192
        assert row.num_answers == len(row.sequences[0].episode.examples) >= 2
