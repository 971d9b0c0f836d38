"""A store of prefixes: found by what they depend on, kept under a byte limit, shared by processes that may be killed."""

import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

from manyicl import prefix_store
from manyicl.errors import PrefixError, StorageError
from manyicl.prefix import Prefix, quantise
from manyicl.prefix_files import PREFIX_FILE, PrefixFacts, PrefixIdentity
from manyicl.prefix_store import PrefixStore, prefix_key

IDENTITY = PrefixIdentity(
    fingerprint="a1",
    dtype="float32",
    num_layers=2,
    num_key_value_heads=3,
    head_size=4,
    format="plain",
    layout={"opening": ""},
    terminator_id=7,
)
FACTS = PrefixFacts(identity=IDENTITY, labels=("yes", "no"))
LARGE = 10**9


def make_prefix(seed: int = 0, *, num_tokens: int = 6) -> Prefix:
    """A prefix of `IDENTITY`'s model whose every number follows from the seed."""
    generator = torch.Generator().manual_seed(seed)
    layers = (torch.randn(2, 1, 3, num_tokens, 4, generator=generator).unbind() for _ in range(2))
    return Prefix((seed, *range(1, num_tokens)), (0, num_tokens), tuple(tuple(pair) for pair in layers))


def is_made_of(prefix: Prefix, seed: int) -> bool:
    expected = make_prefix(seed, num_tokens=prefix.num_tokens)
    pairs = zip(prefix.states, expected.states, strict=True)
    return prefix.token_ids == expected.token_ids and all(
        torch.equal(own, other) for pair in pairs for own, other in zip(*pair, strict=True)
    )


def holds(store: PrefixStore, key: str, seed: int) -> bool:
    found = store.get(key)
    return found is not None and is_made_of(found[0], seed)


def entry_bytes() -> int:
    """What one entry of `make_prefix` takes; all are alike but for their numbers."""
    return 6 * 2 * 2 * 3 * 4 * 4


@pytest.fixture
def store(tmp_path: Path) -> PrefixStore:
    return PrefixStore(tmp_path / "store", max_bytes=LARGE)


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """As on a full disk, the system refuses to write more than that to any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_is_put_is_got_by_any_store_of_the_folder(store: PrefixStore) -> None:
    key = store.put(make_prefix(3), FACTS)
    assert key == prefix_key(FACTS, make_prefix(3).token_ids)
    found = PrefixStore(store.folder, max_bytes=LARGE).get(key)
    assert found is not None
    assert is_made_of(found[0], 3)
    assert found[1] == FACTS
    assert store.keys() == [key]
    assert store.num_bytes == sum(path.stat().st_size for path in (store.folder / key).iterdir()) > entry_bytes()


def test_a_store_is_made_on_first_use(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path / "a" / "b", max_bytes=10)
    assert store.keys() == []
    assert store.num_bytes == 0
    assert store.get("0" * 64) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", "..", "0" * 63, "0" * 65, "G" * 64, "../" + "0" * 61])
def test_what_is_no_key_is_not_looked_for(store: PrefixStore, key: str) -> None:
    (store.folder.parent / ("0" * 61)).mkdir()
    assert store.get(key) is None


def test_the_key_depends_on_everything_that_the_prefix_depends_on() -> None:
    changes: dict[str, Any] = {
        "fingerprint": "b2",
        "dtype": "bfloat16",
        "num_layers": 3,
        "format": "chat",
        "layout": {"opening": "x"},
        "terminator_id": 8,
    }
    variants = [PrefixFacts(identity=IDENTITY.model_copy(update={name: value})) for name, value in changes.items()]
    variants += [PrefixFacts(identity=IDENTITY), FACTS, FACTS.model_copy(update={"instruction": "Say."})]
    variants += [FACTS.model_copy(update={"labels": labels}) for labels in (("no", "yes"), ("yes", "no", ""), ("yesno",))]
    keys = [prefix_key(facts, ids) for facts in variants for ids in ((), (1,), (1, 2), (2, 1), (12,), (1, 2, 3))]
    keys += [prefix_key(FACTS, (1, 2), is_int8=True)]
    assert len(set(keys)) == len(keys)
    assert keys[0] == prefix_key(variants[0], ())


def test_a_plain_and_an_int8_prefix_of_the_same_tokens_are_two_entries(store: PrefixStore) -> None:
    plain, held = make_prefix(), quantise(make_prefix())
    keys = [store.put(plain, FACTS), store.put(held, FACTS)]
    assert keys[1] == prefix_key(FACTS, held.token_ids, is_int8=True)
    found = [store.get(key) for key in keys]
    assert [entry is not None and entry[0].is_int8 for entry in found] == [False, True]


def test_what_is_there_is_not_written_again(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key = store.put(make_prefix(), FACTS)
    monkeypatch.setattr(prefix_store, "save_prefix", lambda *arguments: pytest.fail("it was written"))
    assert store.put(make_prefix(), FACTS) == key


def test_those_used_longest_ago_make_room(tmp_path: Path) -> None:
    probe = PrefixStore(tmp_path / "probe", max_bytes=LARGE)
    probe.put(make_prefix(0), FACTS)
    size = probe.num_bytes
    store = PrefixStore(tmp_path / "store", max_bytes=3 * size + size // 2)
    keys = [store.put(make_prefix(seed), FACTS) for seed in range(3)]
    assert store.keys() == keys
    assert holds(store, keys[0], 0)
    assert store.put(make_prefix(1), FACTS) == keys[1]
    assert store.keys() == [keys[2], keys[0], keys[1]]
    fourth = store.put(make_prefix(3), FACTS)
    assert store.keys() == [keys[0], keys[1], fourth]
    assert store.get(keys[2]) is None
    double = probe.put(make_prefix(4, num_tokens=12), FACTS)
    store.max_bytes = probe.num_bytes  # One of each size.
    assert store.put(make_prefix(4, num_tokens=12), FACTS) == double
    assert store.keys() == [fourth, double]
    assert store.num_bytes == store.max_bytes
    assert sorted(path.name for path in store.folder.iterdir() if not path.name.startswith(".lock")) == sorted(store.keys())


def test_a_prefix_larger_than_the_store_is_refused_and_nothing_is_lost(store: PrefixStore) -> None:
    key = store.put(make_prefix(), FACTS)
    store.max_bytes = store.num_bytes
    for num_tokens in (60, 7):  # Known by its keys and values alone, and only once it is written.
        with pytest.raises(
            StorageError, match=r"the prefix takes \S+ kB, more than the \S+ kB of the whole store. Give a larger"
        ):
            store.put(make_prefix(1, num_tokens=num_tokens), FACTS)
    assert holds(store, key, 0)
    assert not list(store.folder.glob(".writing-*"))


def test_an_opened_prefix_outlives_its_entry(store: PrefixStore) -> None:
    key = store.put(make_prefix(1), FACTS)
    found = store.get(key)
    assert found is not None
    store.max_bytes = store.num_bytes
    store.put(make_prefix(2), FACTS)
    assert store.get(key) is None
    shutil.rmtree(store.folder)
    assert is_made_of(found[0], 1)


def test_what_is_removed_is_gone_and_the_others_stay(store: PrefixStore) -> None:
    key, other = store.put(make_prefix(1), FACTS), store.put(make_prefix(2), FACTS)
    found = store.get(key)
    for removed in (key, key, "0" * 64, "..", other[:10]):
        store.remove(removed)
    assert store.keys() == [other]
    assert sorted(path.name for path in store.folder.iterdir()) == sorted([".lock", other])
    assert found is not None
    assert is_made_of(found[0], 1)


@pytest.mark.parametrize("damage", ["states", "json", "missing", "torn"])
def test_a_damaged_entry_is_removed_and_said_to_be_absent(
    store: PrefixStore, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    key, other = store.put(make_prefix(1), FACTS), store.put(make_prefix(2), FACTS)
    entry = store.folder / key
    (states,) = entry.glob("states-*")
    path = entry / PREFIX_FILE if damage == "json" else states
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if damage == "torn" else content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    with caplog.at_level(logging.WARNING, logger="manyicl.prefix_store"):
        assert store.get(key) is None
    assert len(caplog.messages) == 1
    assert str(entry) in caplog.messages[0]
    assert caplog.messages[0].endswith("; it is removed from the store")
    assert store.keys() == [other]
    assert store.put(make_prefix(1), FACTS) == key
    assert holds(store, key, 1)


@pytest.mark.parametrize("put_again", [False, True])
def test_an_entry_evicted_while_it_is_opened_is_absent_and_not_damaged(
    store: PrefixStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, put_again: bool
) -> None:
    key = store.put(make_prefix(1), FACTS)
    real_open, locked = prefix_store._open, []

    def open_too_late(entry: Path, device: Any) -> Any:
        try:
            with filelock.FileLock(store.folder / ".lock", timeout=0):
                locked.append(False)
        except filelock.Timeout:
            locked.append(True)
        if len(locked) > 1:
            return real_open(entry, device)
        store.max_bytes = store.num_bytes
        store.put(make_prefix(2), FACTS)
        if put_again:
            store.put(make_prefix(1), FACTS)
        raise PrefixError("states: cannot be read")

    monkeypatch.setattr(prefix_store, "_open", open_too_late)
    found = store.get(key)
    assert (found is not None and is_made_of(found[0], 1)) == put_again
    assert locked == [False, True][: 1 + put_again]  # What is found missing is looked for again while nobody can evict.
    assert caplog.messages == []


def test_an_entry_vanishes_whole_before_its_files_do(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key = store.put(make_prefix(1), FACTS)
    store.max_bytes, real_remove, seen = store.num_bytes, shutil.rmtree, []

    def remove(path: Path, **options: Any) -> None:
        seen.append((path.name[:9], (path / PREFIX_FILE).exists(), (store.folder / key).exists()))
        real_remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", remove)
    store.put(make_prefix(2), FACTS)
    assert seen == [(".evicted-", True, False), (".writing-", False, False)]
    assert len(store.keys()) == 1


def test_an_entry_under_a_wrong_name_is_not_given_out(store: PrefixStore, caplog: pytest.LogCaptureFixture) -> None:
    key = store.put(make_prefix(1), FACTS)
    wrong = prefix_key(FACTS, make_prefix(2).token_ids)
    (store.folder / key).rename(store.folder / wrong)
    assert store.get(wrong) is None
    assert "holds another prefix than its name says" in caplog.text
    assert store.keys() == []


def test_a_full_disk_leaves_every_entry(store: PrefixStore) -> None:
    keys = [store.put(make_prefix(seed), FACTS) for seed in range(2)]
    store.max_bytes = store.num_bytes + 100  # Room would have to be made, and is not made before the new one is whole.
    with file_size_limit(400), pytest.raises(StorageError, match="cannot be written"):
        store.put(make_prefix(2), FACTS)
    assert store.keys() == keys
    assert all(holds(store, key, seed) for seed, key in enumerate(keys))
    assert not list(store.folder.glob(".writing-*"))
    third = store.put(make_prefix(2), FACTS)
    assert store.keys() == [keys[1], third]


def test_a_prefix_of_another_model_is_not_kept(store: PrefixStore) -> None:
    facts = PrefixFacts(identity=IDENTITY.model_copy(update={"num_layers": 3}))
    with pytest.raises(PrefixError, match="num_layers 2, not 3"):
        store.put(make_prefix(), facts)
    assert store.keys() == []
    assert not list(store.folder.glob(".writing-*"))


def test_leftovers_of_the_dead_are_removed_and_the_work_of_the_living_is_not(store: PrefixStore) -> None:
    store.put(make_prefix(0), FACTS)
    dead, living, evicted = (store.folder / name for name in (".writing-dead", ".writing-living", ".evicted-0-1"))
    for folder in (dead, living, evicted):
        folder.mkdir()
        (folder / "states").write_bytes(b"half")
    (store.folder / ".writing-gone.lock").touch()
    (store.folder / "notes.txt").write_text("of the user", encoding="utf-8")
    with filelock.FileLock(store.folder / ".writing-living.lock"):
        store.put(make_prefix(1), FACTS)
        assert living.is_dir()
        names = {path.name for path in store.folder.iterdir()} - set(store.keys()) - {".lock"}
        assert names == {".writing-living", ".writing-living.lock", "notes.txt"}
    store.put(make_prefix(2), FACTS)
    assert not living.exists()
    assert len(store.keys()) == 3


def test_a_read_only_store_is_read(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key = store.put(make_prefix(5), FACTS)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    assert holds(store, key, 5)
    assert store.get("0" * 64) is None


def hammer(folder: str, worker: int, max_bytes: int, num_steps: int, results: Any) -> None:
    """Get at random, put what is absent, and report what was seen."""
    store, rng = PrefixStore(Path(folder), max_bytes=max_bytes), random.Random(worker)
    keys = [prefix_key(FACTS, make_prefix(seed).token_ids) for seed in range(8)]
    counts = {"hits": 0, "puts": 0, "wrong": 0, "damaged": 0}
    prefix_store.logger.addFilter(lambda record: bool(counts.update(damaged=counts["damaged"] + 1)))
    kept: list[tuple[int, Prefix]] = []
    for _ in range(num_steps):
        seed = rng.randrange(8)
        found = store.get(keys[seed])
        if found is None:
            store.put(make_prefix(seed), FACTS)
            counts["puts"] += 1
        else:
            counts["hits"] += 1
            counts["wrong"] += not is_made_of(found[0], seed)
            kept = [*kept[-3:], (seed, found[0])]
        counts["wrong"] += sum(not is_made_of(prefix, own) for own, prefix in kept)
    results.put(counts)


def write_forever(folder: str, started: Any) -> None:
    """Write entries until killed."""
    store, seed = PrefixStore(Path(folder), max_bytes=LARGE), 1000
    while True:
        store.put(make_prefix(seed, num_tokens=2000), FACTS)
        seed += 1
        started.set()


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that start in milliseconds, as the server that they are forked from has loaded torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["manyicl.prefix_store"])
    return context


@pytest.mark.distributed
def test_processes_that_share_a_store_never_see_half_an_entry(processes: Any, tmp_path: Path) -> None:
    probe = PrefixStore(tmp_path / "probe", max_bytes=LARGE)
    probe.put(make_prefix(0), FACTS)
    max_bytes = 3 * probe.num_bytes + 100
    results = processes.Queue()
    workers = [
        processes.Process(target=hammer, args=(str(tmp_path / "store"), worker, max_bytes, 200, results)) for worker in range(3)
    ]
    for worker in workers:
        worker.start()
    counts = [results.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join(timeout=300)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    # Three of eight entries fit: whatever the processes' pace, some of 200 are found and some are not.
    assert all(own["hits"] > 10 and own["puts"] > 10 for own in counts), counts
    assert sum(own["wrong"] + own["damaged"] for own in counts) == 0, counts
    store = PrefixStore(tmp_path / "store", max_bytes=max_bytes)
    assert store.num_bytes <= max_bytes
    assert len(store.keys()) == 3
    assert {path.name for path in store.folder.iterdir()} - {".lock"} == set(store.keys())


@pytest.mark.distributed
def test_killed_writers_leave_a_store_that_works(processes: Any, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, max_bytes=LARGE)
    for pause in (0.0, 0.003, 0.011):
        started = processes.Event()
        writer = processes.Process(target=write_forever, args=(str(tmp_path), started))
        writer.start()
        assert started.wait(timeout=300)
        time.sleep(pause)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(timeout=300)
    found = {key: store.get(key) for key in list(store.keys())}
    assert found
    assert all(entry is not None and is_made_of(entry[0], entry[0].token_ids[0]) for entry in found.values())
    store.put(make_prefix(0), FACTS)
    assert {path.name for path in store.folder.iterdir()} - {".lock"} == set(store.keys())
