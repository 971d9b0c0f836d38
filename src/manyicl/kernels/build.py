"""Compile C++ sources of this folder once for this processor, and load the library.

A library is kept in `kernels` of the cache folder under a name made of the hashes of what decides its content: the sources,
the flags, the processor's features, torch and the compiler. A ready one loads in a few milliseconds and needs no compiler.
It has plain C functions and no part of torch or Python in it; threads come from the OpenMP library that torch has loaded.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import filelock
import torch

from manyicl.default_model import cache_folder

FOLDER = Path(__file__).parent
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fno-strict-aliasing", "-w")
TIMEOUT_SECONDS = 300

logger = logging.getLogger(__name__)


class BuildError(Exception):
    """The library cannot be made or loaded here; the message says why and how to mend it."""


def cpu_flags() -> frozenset[str]:
    """Features of the processor as Linux names them; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def load_library(name: str, sources: Sequence[str], headers: Sequence[str], extra_flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The library of these files, compiled now if there is no ready one; several processes may ask at once.

    Args:
        extra_flags: For the compiler, beside `FLAGS`.

    Raises:
        BuildError: there is no compiler, it fails, or the cache folder cannot be used.
    """
    folder = cache_folder() / "kernels"
    flags = (*FLAGS, *extra_flags)
    files = [FOLDER / file for file in (*sources, *headers)]
    content = _hash(*(file.read_bytes() for file in files), *flags, *sorted(cpu_flags()), torch.__version__)
    compiler = _find_compiler()
    try:
        if compiler is None:
            ready = sorted(folder.glob(f"{name}-{content}-*.so"))
            if not ready:
                raise BuildError("there is no C++ compiler. Install g++, or name one in the environment variable CXX")
            return ctypes.CDLL(str(ready[0]))
        target = folder / f"{name}-{content}-{_compiler_hash(compiler)}.so"
        if not target.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{target}.lock", timeout=TIMEOUT_SECONDS):
                if not target.is_file():
                    _compile([compiler, *flags, *(str(FOLDER / source) for source in sources)], target)
        return ctypes.CDLL(str(target))
    except (OSError, filelock.Timeout) as error:
        raise BuildError(f"the folder {folder} cannot be used ({error}). Name another in MANYICL_CACHE") from error


def _compile(command: Sequence[str], target: Path) -> None:
    """Compile to a temporary file and rename it, so that a library is never seen by halves. The lock is held."""
    for left_behind in target.parent.glob(f".{target.stem}-*.so"):  # By a process that was killed.
        left_behind.unlink()
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=".so")
    os.close(descriptor)
    start = time.perf_counter()
    try:
        result = subprocess.run([*command, "-o", name], capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS)
        if result.returncode != 0:
            raise BuildError(f"{command[0]} failed with code {result.returncode}: {result.stderr.strip()[-500:]}")
        Path(name).chmod(0o755)
        Path(name).rename(target)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {TIMEOUT_SECONDS} seconds") from error
    finally:
        Path(name).unlink(missing_ok=True)
    logger.info("Compiled the attention kernel in %.1f seconds; it is kept as %s.", time.perf_counter() - start, target)


def _find_compiler() -> str | None:
    """The C++ compiler's path: $CXX where it is set, else the first usual one."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _compiler_hash(compiler: str) -> str:
    """A hash that changes with the compiler; asking it for its version would take longer than loading the library."""
    path = Path(compiler).resolve()
    state = path.stat()
    return _hash(str(path), str(state.st_size), str(state.st_mtime_ns))


def _hash(*parts: bytes | str) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of all parts."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:16]
