"""Which checkpoints are trusted, and which are removed."""

import hashlib
import json
import logging

import pytest

from manyicl.checkpoints import (
    MANIFEST,
    drop_old_checkpoints,
    is_whole,
    list_checkpoints,
    newest_whole_checkpoint,
    seal_checkpoint,
)


def make_checkpoint(folder, number, *, sealed=True):
    checkpoint = folder / f"checkpoint-{number}"
    (checkpoint / "inner").mkdir(parents=True)
    (checkpoint / "weights.bin").write_bytes(b"weights %d" % number)
    (checkpoint / "inner" / "state.bin").write_bytes(b"state %d" % number)
    if sealed:
        seal_checkpoint(checkpoint)
    return checkpoint


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_a_manifest_holds_the_hash_of_every_file(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 5)
    hashes = json.loads((checkpoint / MANIFEST).read_text())
    assert list(hashes) == ["inner/state.bin", "weights.bin"]
    assert hashes["weights.bin"] == hashlib.sha256(b"weights 5").hexdigest()
    assert is_whole(checkpoint)


def break_manifest(checkpoint):
    (checkpoint / MANIFEST).write_text('{"weights.bin": ')


def empty_manifest(checkpoint):
    (checkpoint / MANIFEST).write_text("{}")


def list_manifest(checkpoint):
    (checkpoint / MANIFEST).write_text("[]")


def drop_manifest(checkpoint):
    (checkpoint / MANIFEST).unlink()


def drop_file(checkpoint):
    (checkpoint / "inner" / "state.bin").unlink()


def change_file(checkpoint):
    (checkpoint / "weights.bin").write_bytes(b"weights 6")


def cut_file(checkpoint):
    (checkpoint / "weights.bin").write_bytes(b"weigh")


@pytest.mark.parametrize(
    "harm",
    [break_manifest, empty_manifest, list_manifest, drop_manifest, drop_file, change_file, cut_file],
    ids=lambda f: f.__name__,
)
def test_a_checkpoint_that_is_not_what_its_manifest_says_is_removed_and_an_older_one_taken(tmp_path, caplog, harm):
    older, newer = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 10)
    harm(newer)
    assert not is_whole(newer)
    with caplog.at_level(logging.WARNING):
        assert newest_whole_checkpoint(tmp_path) == older
    assert names(tmp_path) == ["checkpoint-5"]
    assert f"{newer} is not whole" in caplog.text


def test_the_newest_is_by_number_and_not_by_name_or_time(tmp_path):
    for number in (100, 20, 9):
        make_checkpoint(tmp_path, number)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-200").write_text("a file")
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_no_checkpoint_is_none(tmp_path):
    assert newest_whole_checkpoint(tmp_path) is None
    assert newest_whole_checkpoint(tmp_path / "absent") is None
    make_checkpoint(tmp_path, 3, sealed=False)
    assert newest_whole_checkpoint(tmp_path) is None
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("best", "kept"),
    [(None, [30, 40]), (10, [10, 30, 40]), (30, [30, 40]), (40, [30, 40])],
)
def test_two_are_kept_and_the_best(tmp_path, best, kept):
    for number in (10, 20, 30, 40):
        make_checkpoint(tmp_path, number)
    drop_old_checkpoints(tmp_path, best=tmp_path / f"checkpoint-{best}" if best else None)
    assert names(tmp_path) == [f"checkpoint-{number}" for number in kept]


def test_a_kill_while_an_old_one_is_removed_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    for number in (10, 20, 30):
        make_checkpoint(tmp_path, number)
    monkeypatch.setattr("manyicl.checkpoints.shutil.rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        drop_old_checkpoints(tmp_path, best=None)
    assert [is_whole(path) for path in list_checkpoints(tmp_path)] == [False, True, True]


def test_sealing_again_covers_what_was_added(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 5)
    (checkpoint / "late.bin").write_bytes(b"late")
    seal_checkpoint(checkpoint)
    (checkpoint / "late.bin").unlink()
    assert not is_whole(checkpoint)
