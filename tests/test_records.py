import errno
import gzip
import json
import logging
import math
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from manyicl.errors import RecordsError, StorageError
from manyicl.records import (
    EvaluationRecord,
    QueryScores,
    RecordWriter,
    SharedRecordWriter,
    mean_curve,
    merge_records,
    read_records,
    task_curves,
)


def record(**fields) -> EvaluationRecord:
    defaults = {
        "method": "in-context",
        "model": "default",
        "model_note": "dequantised from Q4_1",
        "task": "colour",
        "family": "classification",
        "role": "held_out",
        "metric": "accuracy",
        "shots": 4,
        "num_demonstrations": 4,
        "seed": 0,
        "value": 0.5,
        "num_queries": 2,
        "prefix_tokens": 40,
        "query_tokens": 9,
        "seconds": 0.25,
        "prefill_seconds": 0.5,
        "fingerprint": "f",
        "versions": {"torch": "2.13"},
        "queries": QueryScores(ids=[0, 1], scores=[1.0, 0.0], gold=[0, 1], predicted=[0, 0]),
    }
    return EvaluationRecord.model_validate(defaults | fields)


def written(path: Path, *records: EvaluationRecord) -> Path:
    writer = RecordWriter(path)
    for each in records:
        writer.append(each)
    return path


def test_records_are_lines_of_json_that_read_back_the_same(tmp_path: Path) -> None:
    records = [record(), record(shots="max", num_demonstrations=17), record(model="modèle 猫", seed=2, value=1 / 3)]
    path = written(tmp_path / "deep" / "records.jsonl", *records)
    assert read_records(path) == records
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    assert json.loads(lines[1])["shots"] == "max"
    assert json.loads(lines[0]) == json.loads(records[0].model_dump_json())


def test_a_record_holds_no_text_of_the_task() -> None:
    assert set(QueryScores.model_fields) == {"ids", "scores", "gold", "predicted"}
    assert {field.annotation for field in QueryScores.model_fields.values()} == {list[int], list[float]}


def test_gzip_is_read_and_not_written(tmp_path: Path) -> None:
    plain = written(tmp_path / "a.jsonl", record(), record(seed=1))
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_records(packed) == [record(), record(seed=1)]
    before = packed.read_bytes()
    with pytest.raises(RecordsError, match=r"a\.jsonl\.gz: records are appended line by line, .* Name a \.jsonl file"):
        RecordWriter(packed)
    assert packed.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "noise", "plain"])
def test_a_damaged_gzip_file_is_an_error(tmp_path: Path, damage: str) -> None:
    whole = gzip.compress(record().model_dump_json().encode() + b"\n")
    content = {"cut": whole[:-20], "noise": whole[:20] + b"\x00" * 9 + whole[29:], "plain": b"no gzip"}[damage]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(RecordsError, match=r"a\.jsonl\.gz: cannot be read \("):
        read_records(path)


@pytest.mark.parametrize("torn", [b'{"schema_version":1,"method":"in-', record(seed=9).model_dump_json().encode(), b"\xff"])
def test_a_torn_last_line_is_passed_over_said_and_cut_off(tmp_path: Path, caplog, torn: bytes) -> None:
    path = written(tmp_path / "a.jsonl", record())
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with caplog.at_level(logging.WARNING):
        assert read_records(path) == [record()]
    assert caplog.messages == [f"{path}: the last line ({len(torn)} bytes) is torn; its cell is done again"]
    assert path.read_bytes() == whole + torn
    writer = RecordWriter(path)
    assert path.read_bytes() == whole
    writer.append(record(seed=1))
    assert read_records(path) == [record(), record(seed=1)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "Invalid JSON"),
        ("", "Invalid JSON"),
        ("[1]", "Input should be an object"),
        ('{"schema_version": 2}', "Input should be 1"),
        (json.dumps(json.loads(record().model_dump_json()) | {"colour": 1}), "Extra inputs are not permitted"),
        (json.dumps(json.loads(record().model_dump_json()) | {"shots": "many"}), "Input should be a valid integer"),
    ],
)
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = written(tmp_path / "a.jsonl", record())
    path.write_text(path.read_text() + line + "\n" + path.read_text())
    with pytest.raises(RecordsError) as raised:
        read_records(path)
    assert str(raised.value).startswith(f"{path}:2: no record: ")
    assert problem in str(raised.value)
    with pytest.raises(RecordsError, match=":2: no record"):
        RecordWriter(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match=r"absent\.jsonl: cannot be read \("):
        read_records(tmp_path / "absent.jsonl")


def test_values_that_are_no_numbers_are_no_results() -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(ValidationError, match="finite number"):
            record(value=value)


# Resuming.


def test_finished_cells_are_found_again(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", record(), record(shots="max"))
    writer = RecordWriter(path)
    assert writer.find(record().key, "f") == record()
    assert writer.find(record(shots="max").key, "f") == record(shots="max")
    assert writer.find(record(shots=16).key, "f") is None
    for other in ("method", "model", "task", "split"):
        assert writer.find(record(**{other: "another"}).key, "f") is None
    writer.append(record(shots=16))
    assert writer.find(record(shots=16).key, "f") == record(shots=16)


def test_a_cell_of_other_settings_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", record())
    with pytest.raises(RecordsError) as raised:
        RecordWriter(path).find(record().key, "other")
    assert str(raised.value) == (
        f"{path}: holds colour at 4 shots, seed 0, of another model, other examples or other settings. "
        "Choose another output file."
    )


@pytest.mark.parametrize("written_bytes", [0, 100])
def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch, written_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    writer = RecordWriter(path)
    writer.append(record())
    whole = path.read_bytes()

    def fail(descriptor: int) -> None:
        if written_bytes:  # Part of the line reached the disk.
            os.truncate(path, len(whole) + written_bytes)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match=r"a\.jsonl: cannot be written \(No space left on device\)\. Free some space"):
            writer.append(record(seed=1))
    assert path.read_bytes() == whole
    assert writer.find(record(seed=1).key, "f") is None
    # When there is room again, the same writer goes on, and the file stays whole.
    writer.append(record(seed=2))
    assert read_records(path) == [record(), record(seed=2)]


def test_a_line_that_reaches_the_disk_in_parts_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    from test_files import largest_file

    path = tmp_path / "a.jsonl"
    writer = RecordWriter(path)
    writer.append(record())
    whole = path.read_bytes()
    with largest_file(len(whole) + 50), pytest.raises(StorageError, match="File too large"):
        writer.append(record(seed=1))
    assert path.read_bytes() == whole
    writer.append(record(seed=2))
    assert read_records(path) == [record(), record(seed=2)]


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"records\.jsonl: cannot be written"):
        RecordWriter(tmp_path / "file" / "records.jsonl")


# Merging.


def test_files_are_merged_cell_by_cell(tmp_path: Path) -> None:
    first = written(tmp_path / "a.jsonl", record(), record(seed=1))
    second = written(tmp_path / "b.jsonl", record(seed=1, seconds=9.0), record(seed=2))
    assert merge_records([first, second]) == [record(), record(seed=1), record(seed=2)]


@pytest.mark.parametrize("change", [{"value": 0.75}, {"fingerprint": "g"}])
def test_files_that_contradict_each_other_are_an_error(tmp_path: Path, change: dict) -> None:
    first = written(tmp_path / "a.jsonl", record())
    second = written(tmp_path / "b.jsonl", record(**change))
    with pytest.raises(RecordsError) as raised:
        merge_records([first, second])
    value = change.get("value", 0.5)
    assert str(raised.value) == (
        f"{second}: ('in-context', 'default', 'colour', 'test', 4, 0, '') has value {value:.4f}, another file says 0.5000. "
        "Keep one of them."
    )


# Curves.


def test_a_tasks_curve_is_the_mean_interval_and_worst_over_seeds() -> None:
    records = [record(seed=seed, value=value) for seed, value in enumerate((0.5, 0.6, 0.7))]
    records += [record(shots="max", num_demonstrations=9, value=0.9), record(shots=16, value=0.8)]
    points = task_curves(records)
    assert [point.shots for point in points] == [4, 16, "max"]
    first = points[0]
    assert (first.task, first.num_seeds, first.worst, first.num_tasks) == ("colour", 3, 0.5, 1)
    assert first.mean == pytest.approx(0.6)
    assert first.high - first.mean == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert math.isnan(points[1].low)


def test_a_mean_curve_is_a_mean_over_tasks_with_its_interval_over_seeds() -> None:
    values = {"a": (0.2, 0.4), "b": (0.6, 1.0)}
    records = [record(task=task, seed=seed, value=value) for task, own in values.items() for seed, value in enumerate(own)]
    (point,) = mean_curve(records)
    # Seed means 0.4 and 0.7, their mean 0.55, half-width t(0.975, 1) * 0.3 / 2.
    assert point.mean == pytest.approx(0.55)
    assert point.high - point.mean == pytest.approx(12.706205 * 0.15, rel=1e-6)
    assert (point.worst, point.num_seeds, point.num_tasks, point.task) == (pytest.approx(0.4), 2, 2, "mean over tasks")


def test_a_mean_curve_says_how_many_tasks_reach_each_point() -> None:
    records = [
        record(task=task, shots=shots, value=value) for task, shots, value in (("a", 4, 0.2), ("b", 4, 0.4), ("a", 64, 0.9))
    ]
    points = mean_curve(records)
    assert [(point.shots, point.num_tasks, point.mean) for point in points] == [(4, 2, pytest.approx(0.3)), (64, 1, 0.9)]


def test_seeds_that_miss_a_task_do_not_tilt_the_mean() -> None:
    records = [
        record(task="a", seed=0, value=0.0),
        record(task="b", seed=0, value=1.0),
        record(task="b", seed=1, value=1.0),
    ]
    (point,) = mean_curve(records)
    assert (point.mean, point.num_seeds) == (0.5, 1)
    # Where no seed reaches every task, each task weighs the same whatever its number of seeds.
    (point,) = mean_curve([record(task="a", seed=0, value=0.0), *(record(task="b", seed=seed, value=1.0) for seed in (1, 2, 3))])
    assert (point.mean, point.num_seeds, point.num_tasks) == (0.5, 1, 2)


def test_models_and_methods_have_curves_of_their_own() -> None:
    records = [record(), record(model="tuned", value=0.9), record(method="nearest", value=0.7)]
    assert [(point.method, point.model, point.mean) for point in task_curves(records)] == [
        ("in-context", "default", 0.5),
        ("in-context", "tuned", 0.9),
        ("nearest", "default", 0.7),
    ]
    assert len(mean_curve(records)) == 3


def shared(output: Path, rank: int, size: int = 2, request: str = "request") -> SharedRecordWriter:
    return SharedRecordWriter(output, place=(rank, size), request=request)


def beside(output: Path) -> list[str]:
    """What stands beside the output, without the output's name and the hash of the request."""
    return sorted(path.name.removeprefix(output.name)[10:] for path in output.parent.glob(f"{output.name}.*"))


def test_the_last_process_to_finish_merges_the_files_of_all(tmp_path: Path) -> None:
    output = written(tmp_path / "a.jsonl", record(seed=9))
    writers = [shared(output, rank, 3) for rank in range(3)]
    for rank, writer in enumerate(writers):
        writer.append(record(seed=rank))
    assert beside(output) == ["0-of-3.part", "1-of-3.part", "2-of-3.part"]
    assert not writers[2].finish()
    assert not writers[0].finish()
    assert beside(output) == ["0-of-3.done", "1-of-3.part", "2-of-3.done"]
    assert read_records(output) == [record(seed=9)]
    assert writers[1].finish()
    assert beside(output) == []
    assert sorted(each.seed for each in read_records(output)) == [0, 1, 2, 9]


def test_of_two_that_are_last_one_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "a.jsonl"
    first, second = shared(output, 0), shared(output, 1)
    first.append(record(seed=0))
    second.append(record(seed=1))
    replace = Path.replace

    def replace_and_let_the_other_finish(path: Path, target: Path) -> Path:
        done = replace(path, target)
        if target.name.endswith("0-of-2.done"):  # Both have marked their share as finished before either looks.
            monkeypatch.setattr(Path, "replace", replace)
            assert second.finish()
        return done

    monkeypatch.setattr(Path, "replace", replace_and_let_the_other_finish)
    assert not first.finish()
    assert sorted(each.seed for each in read_records(output)) == [0, 1]
    assert beside(output) == []


def test_the_mark_can_be_taken_by_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "a.jsonl"
    first, second = shared(output, 0), shared(output, 1)
    first.append(record(seed=0))
    second.append(record(seed=1))
    second.path.replace(second.path.with_suffix(".done"))
    replace = Path.replace

    def taken_by_another(path: Path, target: Path) -> Path:
        if target.name.endswith(".merging"):
            replace(path, target)  # The other was first.
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", taken_by_another)
    assert not first.finish()
    assert not output.exists()
    assert beside(output) == ["0-of-2.merging", "1-of-2.done"]
    monkeypatch.undo()
    # The one that took it was killed: whoever is started again finds all done, in any number of processes.
    assert not shared(output, 1).finish()
    assert beside(output) == ["0-of-2.merging", "1-of-2.done"]
    again = shared(output, 0)
    assert again.finished.keys() == {record(seed=0).key}
    assert again.finish()
    assert sorted(each.seed for each in read_records(output)) == [0, 1]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_a_stopped_evaluation_left_is_not_computed_again(tmp_path: Path, size: int) -> None:
    output = written(tmp_path / "a.jsonl", record(seed=5))
    finished, killed = shared(output, 0), shared(output, 1)
    finished.append(record(seed=0))
    assert not finished.finish()
    killed.append(record(seed=1))
    with killed.path.open("ab") as stream:
        stream.write(b'{"torn')
    writers = [RecordWriter(output)] if size == 1 else [shared(output, rank, size) for rank in range(size)]
    for writer in writers:
        for seed in (0, 1, 5):
            assert writer.find(record(seed=seed).key, "f") == record(seed=seed)
        assert writer.find(record(seed=2).key, "f") is None
    assert [writer.finish() for writer in writers] == [False] * (size - 1) + [True]
    assert sorted(each.seed for each in read_records(output)) == [0, 1, 5]
    assert beside(output) == []


def test_shares_of_another_request_are_no_sign_that_all_is_done(tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    for rank in (0, 1):
        shared(output, rank, request="few seeds").append(record(seed=rank))
    assert not shared(output, 1, request="few seeds").finish()
    writer = shared(output, 0, request="more seeds")
    writer.append(record(seed=2))
    assert not writer.finish()
    assert not output.exists()
    last = shared(output, 1, request="more seeds")
    assert last.find(record(seed=1).key, "f") == record(seed=1)
    assert last.finish()
    assert sorted(each.seed for each in read_records(output)) == [0, 1, 2]
    assert beside(output) == []


def test_a_cell_found_elsewhere_stands_in_the_processs_own_file_too(tmp_path: Path) -> None:
    output = written(tmp_path / "a.jsonl", record(seed=0), record(seed=1))
    writer = shared(output, 0)
    for _ in range(2):
        assert writer.find(record(seed=1).key, "f") == record(seed=1)
    assert read_records(writer.path) == [record(seed=1)]
    with pytest.raises(
        RecordsError, match=r"holds colour at 4 shots, seed 0, of another model, other examples or other settings"
    ):
        writer.find(record(seed=0).key, "g")
    assert read_records(writer.path) == [record(seed=1)]


def test_processes_that_contradict_each_other_are_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    first, second = shared(output, 0), shared(output, 1)
    first.append(record(value=0.5))
    second.append(record(value=0.25))
    assert not first.finish()
    with pytest.raises(RecordsError, match=r"has value 0\.\d+, another file says 0\.\d+\. Keep one of them"):
        second.finish()
    assert not output.exists()
    assert len(beside(output)) == 2


def test_shared_records_are_not_appended_to_gzip(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match=r"a\.jsonl\.gz: records are appended line by line"):
        shared(tmp_path / "a.jsonl.gz", 0)
    assert list(tmp_path.iterdir()) == []


def test_other_files_beside_the_output_are_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    others = [
        tmp_path / name
        for name in ("a.jsonl.gz", "a.jsonl.notes.part", "a.jsonl.5f0c1a22-0-of-2.partial", "b.jsonl.5f0c1a22-0-of-2.part")
    ]
    for path in others:
        path.write_text("kept")
    assert RecordWriter(output).finish()
    for rank in (0, 1):
        shared(output, rank).finish()
    assert [path.read_text() for path in others] == ["kept"] * 4
