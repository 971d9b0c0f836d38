"""API keys: a file of hashes, one line a key, and the tenant that a key belongs to.

    # tenant  sha256 of the key                                                  added
    acme      9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08  2026-01-31

The key itself is shown once, when it is made, and kept nowhere. A key holds 256 random bits, which no one can try through: a slow
hash, which protects passwords because people choose few of them, would only cost time on every request. The file is read again
when it changes, so that a removed line is a revoked key, and a removed file revokes them all. A file that is there and cannot be
read leaves the keys as they were.
"""

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import filelock

from manyicl.errors import UserInputError
from manyicl.files import storage_errors, write_text_atomic

logger = logging.getLogger(__name__)

TENANT_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_KEY_BYTES = 32
_LOCK_SECONDS = 30


def hash_key(key: str) -> str:
    """The SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def add_key(path: Path, tenant: str) -> str:
    """A new key of a tenant, whose hash is added to the file.

    Raises:
        UserInputError: the tenant's name cannot be used, the file holds a broken line, or another process keeps it locked.
    """
    if not TENANT_PATTERN.fullmatch(tenant):
        raise UserInputError(f"tenant {tenant!r}: use 1 to 64 small letters, digits, - and _, the first a letter or digit.")
    key = f"mi-{secrets.token_urlsafe(_KEY_BYTES)}"
    with _lock(path):
        if path.exists():
            read_keys(path)
        before = path.read_text(encoding="utf-8") if path.exists() else "# tenant, SHA-256 of the key, day it was added\n"
        write_text_atomic(path, f"{before.rstrip()}\n{tenant} {hash_key(key)} {datetime.now(UTC):%Y-%m-%d}\n")
    return key


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Keep other processes from adding a key, which one of both would lose."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{path}.lock", timeout=_LOCK_SECONDS)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise UserInputError(f"{path}: another process has been adding a key for {_LOCK_SECONDS} s. Try again.") from error
    try:
        yield
    finally:
        lock.release()


def read_keys(path: Path) -> list[tuple[str, str]]:
    """Hash and tenant of each key in a file.

    Raises:
        UserInputError: the file is missing or holds a broken line, which is named without being shown.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserInputError(
            f"{path}: the keys cannot be read ({error}). Make one: manyicl keys add TENANT --file {path}"
        ) from error
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        if len(parts) < 2 or not TENANT_PATTERN.fullmatch(parts[0]) or not _HASH.fullmatch(parts[1]):
            raise UserInputError(
                f"{path}:{number}: not a tenant's name and a SHA-256 of 64 hexadecimal digits. Make lines with: manyicl keys add "
                f"TENANT --file {path}"
            )
        keys.append((parts[1], parts[0]))
    return keys


class KeyRing:
    """Who a key belongs to, by a file that may change while the service runs.

    Raises:
        UserInputError: the file is missing, broken or without keys.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._read_stamp()
        self._keys = read_keys(path)
        if not self._keys:
            raise UserInputError(
                f"{path}: holds no key, so nobody could come in. Make one: manyicl keys add TENANT --file {path}"
            )

    def find_tenant(self, key: str) -> str | None:
        """The tenant of a key, or None; takes as long for a key that is nearly right as for any other."""
        self._reread()
        given = hash_key(key)
        found = None
        for known, tenant in self._keys:
            if hmac.compare_digest(known, given):
                found = tenant
        return found

    def _read_stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size

    def _reread(self) -> None:
        stamp = self._read_stamp()
        if stamp == self._stamp:
            return
        try:
            self._keys = read_keys(self._path)
        except UserInputError as error:
            logger.error("%s", error)
            if stamp is None:
                self._keys = []
            # Otherwise it is half edited, perhaps; the keys as they were stay valid until it is mended.
        self._stamp = stamp
