"""Writing files so that a reader never sees half of one.

Everything is written to a temporary file in the same folder, synced, and renamed last. A disk that fills or a folder that
cannot be written becomes a `StorageError`, and the temporary file is removed.
"""

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from manyicl.errors import StorageError


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write inside the block into a `StorageError` that names `path`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise  # torch.save (2.8 to 2.13) raises a bare RuntimeError of that name for a full disk, and others are not meant.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StorageError(
            f"{path}: cannot be written ({reason}). Free some space or choose a folder that you may write."
        ) from error


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step: a temporary file beside it, synced, then renamed. A file keeps its mode.

    Raises:
        StorageError: the disk is full or the folder cannot be written; `path` is as it was before.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o644
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.chmod(mode)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` in one step; see `write_bytes_atomic`."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: Path, content: Any) -> None:
    """Write `content` as indented JSON to `path` in one step; see `write_bytes_atomic`."""
    write_text_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
