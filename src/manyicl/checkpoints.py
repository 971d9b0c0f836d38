"""Checkpoints that can be trusted after a kill: a manifest of hashes, synced and renamed last.

The trainer writes a checkpoint's files in place. Only when all are on disk does the manifest appear; a checkpoint without
one, or whose files do not match it, is never resumed from.
"""

import json
import logging
import os
import shutil
from pathlib import Path

from manyicl.files import hash_file, write_json_atomic

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
NUM_KEPT = 2  # Unless more are asked for: one may be torn.


def seal_checkpoint(folder: Path) -> None:
    """Sync every file of a checkpoint and write its manifest last."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            hashes[path.relative_to(folder).as_posix()] = hash_file(path)
    write_json_atomic(folder / MANIFEST, hashes)


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint holds exactly what its manifest says."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(hashes, dict)
        and bool(hashes)
        and all((folder / name).is_file() and hash_file(folder / name) == value for name, value in hashes.items())
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest first, by update number."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that holds what its manifest says; broken newer ones are removed, and that is said."""
    for path in reversed(list_checkpoints(folder)):
        if is_whole(path):
            return path
        logger.warning("%s is not whole (the run was stopped while it was written); it is removed", path)
        shutil.rmtree(path)
    return None


def drop_old_checkpoints(folder: Path, *, best: Path | None, num_kept: int = NUM_KEPT) -> None:
    """Remove all but the newest `num_kept` checkpoints and the best one."""
    for path in list_checkpoints(folder)[:-num_kept]:
        if best is None or path.resolve() != best.resolve():
            (path / MANIFEST).unlink(missing_ok=True)  # First, so that a kill in between leaves no half that looks whole.
            shutil.rmtree(path)
