"""Prefixes kept on disk under a byte limit, for any number of processes.

    folder/<key>/                      one prefix, as `prefix_files` writes it; its last use is the time of its prefix.json
    folder/.writing-<random>/ .lock    a prefix that a process is writing now, renamed when whole
    folder/.lock                       held while entries are put in place and evicted, never while states are written

In: prefixes under a key made of everything they depend on. Out: the same prefix, mapped into memory, or None. Cost of a hit: see
`prefix_files`. The limit counts finished entries; what is being written comes on top. What is lost: when a prefix does not
fit, those used longest ago are removed; a process that has one of them open keeps it.

A reader takes no lock and never sees half an entry. A damaged entry is removed, said, and reported as absent. What killed
writers left is removed by the next writer: their locks were released with them.
"""

import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import filelock
import torch

from manyicl.errors import PrefixError, StorageError
from manyicl.files import storage_errors
from manyicl.planning import show_bytes
from manyicl.prefix import Prefix
from manyicl.prefix_files import PREFIX_FILE, PrefixFacts, open_any_prefix, save_prefix

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{64}")
_WRITING, _EVICTED = ".writing-", ".evicted-"


def prefix_key(facts: PrefixFacts, token_ids: Sequence[int], *, is_int8: bool = False) -> str:
    """The key of a prefix: SHA-256 over all it depends on, so that equal keys mean equal prefixes.

    That is the model's fingerprint, dtype, format and layout, the instruction, the labels, the tokens in order, and whether keys
    and values are held as 8-bit integers.
    """
    digest = hashlib.sha256(facts.model_dump_json().encode())
    digest.update(f"\n{'int8' if is_int8 else 'plain'}\n{','.join(map(str, token_ids))}".encode())
    return digest.hexdigest()


class PrefixStore:
    """Prefixes in a folder that several processes share.

    Args:
        folder: Made on first use. Other files in it are left alone.
        max_bytes: The most that finished entries may take on disk; every process should give the same.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def keys(self) -> list[str]:
        """Keys of the entries, the one used longest ago first."""
        return [path.name for path in self._entries()]

    @property
    def num_bytes(self) -> int:
        """Disk space that finished entries take now."""
        return sum(map(_measure, self._entries()))

    def get(self, key: str, *, device: torch.device | str = "cpu") -> tuple[Prefix, PrefixFacts] | None:
        """The prefix of a key (see `prefix_key`), verified, or None; counts as a use.

        Raises:
            StorageError: a damaged entry cannot be removed.
        """
        if not _KEY.fullmatch(key):
            return None
        entry = self.folder / key
        if not _touch(entry):
            return None
        try:
            return _open(entry, device)
        except PrefixError:
            # Evicted or replaced between two of our steps, or damaged: with the lock, which others need for that, we know.
            with self._lock():
                if not entry.is_dir():
                    return None
                try:
                    return _open(entry, device)
                except PrefixError as error:
                    logger.warning("%s; it is removed from the store", error)
                    _evict(entry)
                    return None

    def put(self, prefix: Prefix, facts: PrefixFacts) -> str:
        """Keep a prefix and return its key; entries used longest ago make room.

        One that is there already is not written again, and counts as used.

        Raises:
            PrefixError: the prefix is not one of the model that `facts` names.
            StorageError: it alone exceeds the limit, the disk is full or the folder cannot be written; no entry is lost.
        """
        key = prefix_key(facts, prefix.token_ids, is_int8=prefix.is_int8)
        entry = self.folder / key
        if _touch(entry):
            return key
        self._check_size(prefix.num_bytes)
        with storage_errors(self.folder), self._writing_folder() as writing:
            save_prefix(prefix, facts, writing)
            num_bytes = _measure(writing)
            self._check_size(num_bytes)
            with self._lock():
                if not _touch(entry):  # Otherwise another process was first.
                    self._make_room(num_bytes)
                    writing.rename(entry)
        return key

    def note_use(self, keys: Iterable[str]) -> None:
        """Count entries as used now, the last one last; those that are no longer there are passed over."""
        for key in keys:
            _touch(self.folder / key)

    def remove(self, key: str) -> None:
        """Remove the prefix of a key from the disk, where there is one; who has it open keeps it.

        Raises:
            StorageError: the folder cannot be written.
        """
        if _KEY.fullmatch(key):
            with self._lock():
                _evict(self.folder / key)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            raise StorageError(
                f"{self.folder}: the prefix takes {show_bytes(num_bytes)}, more than the {show_bytes(self.max_bytes)} of the "
                "whole store. Give a larger max_bytes, fewer demonstrations, or quantise the prefix."
            )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.folder / ".lock"):
                yield

    @contextmanager
    def _writing_folder(self) -> Iterator[Path]:
        """A new folder to write an entry in, locked as long as this process lives, and removed if it is still there."""
        with self._lock():
            self._remove_leftovers()
            writing = Path(tempfile.mkdtemp(dir=self.folder, prefix=_WRITING))
            writing.chmod(0o755)
            lock = filelock.FileLock(_lock_path(writing))
            lock.acquire()
        try:
            yield writing
        finally:
            shutil.rmtree(writing, ignore_errors=True)
            lock.release()
            _lock_path(writing).unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """Remove what killed processes left. The caller holds the store's lock, under which writers start."""
        for path in self.folder.glob(f"{_EVICTED}*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(f"{_WRITING}*"):
            if not path.is_dir():
                if not path.with_suffix("").exists():
                    path.unlink(missing_ok=True)  # A lock whose folder has been put in place or removed.
                continue
            lock = filelock.FileLock(_lock_path(path))
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                continue  # Its writer is alive.
            shutil.rmtree(path, ignore_errors=True)
            lock.release()
            _lock_path(path).unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        """Evict entries, the one used longest ago first, until `num_bytes` more fit. The caller holds the store's lock."""
        sizes = {entry: _measure(entry) for entry in self._entries()}
        total = sum(sizes.values())
        for entry, size in sizes.items():
            if total + num_bytes <= self.max_bytes:
                break
            _evict(entry)
            total -= size

    def _entries(self) -> list[Path]:
        """Folders of entries, the one used longest ago first; one without prefix.json was never used."""
        try:
            found = [path for path in self.folder.iterdir() if _KEY.fullmatch(path.name)]
        except FileNotFoundError:
            return []
        return sorted(found, key=lambda path: (_last_use(path), path.name))


def _lock_path(writing: Path) -> Path:
    return writing.with_name(f"{writing.name}.lock")


def _open(entry: Path, device: torch.device | str) -> tuple[Prefix, PrefixFacts]:
    """The prefix of an entry, whose content must be what its name says."""
    prefix, facts = open_any_prefix(entry, device=device)
    if prefix_key(facts, prefix.token_ids, is_int8=prefix.is_int8) != entry.name:
        raise PrefixError(f"{entry}: holds another prefix than its name says")
    return prefix, facts


def _touch(entry: Path) -> bool:
    """Note a use of an entry now; whether there is one."""
    now = time.time_ns()
    try:
        os.utime(entry / PREFIX_FILE, ns=(now, now))
    except PermissionError:
        return True  # A store that others filled and that may only be read.
    except OSError:
        return False
    return True


def _last_use(entry: Path) -> int:
    try:
        return (entry / PREFIX_FILE).stat().st_mtime_ns
    except OSError:
        return 0


def _measure(folder: Path) -> int:
    """Bytes of a folder's files; those that vanish meanwhile count nothing."""
    total = 0
    try:
        for path in folder.iterdir():
            total += path.stat().st_size
    except OSError:
        pass
    return total


def _evict(entry: Path) -> None:
    """Take an entry out of sight in one step, then delete it; who has it open keeps it."""
    away = entry.with_name(f"{_EVICTED}{entry.name[:16]}-{time.time_ns()}")
    try:
        entry.rename(away)
    except FileNotFoundError:
        return
    shutil.rmtree(away, ignore_errors=True)
