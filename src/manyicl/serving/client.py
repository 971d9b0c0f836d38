"""A small client of the service, for the shell. Programs use any OpenAI client.

In: the service's address and a key, from MANYICL_URL and MANYICL_API_KEY unless given. Out: its answers as plain data. Needs
nothing but Python.
"""

import json
import os
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from manyicl.errors import ManyICLError, UserInputError

DEFAULT_URL = "http://127.0.0.1:8000"
_POLL_SECONDS = 0.2
_TIMEOUT_SECONDS = 600


class Client:
    """Calls of a service's addresses.

    Args:
        url: Where it listens; MANYICL_URL, or this machine's port 8000, where it is None.
    """

    def __init__(self, url: str | None = None) -> None:
        self._url = (url or os.environ.get("MANYICL_URL") or DEFAULT_URL).rstrip("/")
        key = os.environ.get("MANYICL_API_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The answer of an address; a body that is bytes is a form, and anything else becomes JSON.

        Raises:
            UserInputError: the service refuses the request, or cannot be reached.
            ManyICLError: it failed, or is too busy.
        """
        headers = dict(self._headers)
        if isinstance(body, bytes):
            headers["Content-Type"] = f"multipart/form-data; boundary={body[2:34].decode()}"
        elif body is not None:
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        try:
            request = urllib.request.Request(f"{self._url}/v1/{path}", body, headers, method=method)
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            message = _read_message(error)
            if error.code < 500 and error.code != 429:
                raise UserInputError(f"{self._url}: {message}") from error
            raise ManyICLError(f"{self._url}: {message}") from error
        except (OSError, ValueError) as error:
            raise UserInputError(f"{self._url}: no service answers ({error}). Start it, or give its --url.") from error

    def make(self, name: str, file: Path, *, seed: int = 0, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """Make a model of a training file, and wait for it.

        Args:
            tell: Told each event of the job.

        Raises:
            UserInputError: the file cannot be read or used.
        """
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserInputError(f"{file}: cannot be read ({error.strerror}).") from error
        uploaded = self.call("POST", "files", _form(file.name, content))
        job = self.call("POST", "fine_tuning/jobs", {"training_file": uploaded["id"], "suffix": name, "seed": seed})
        told: str | None = None
        while True:
            job = self.call("GET", f"fine_tuning/jobs/{job['id']}")
            events = self.call("GET", f"fine_tuning/jobs/{job['id']}/events?limit=100")["data"]
            for event in _pick_new(events, told):
                tell(event["message"])
            told = events[0]["id"]
            if job["status"] == "succeeded":
                return self.show(name)
            if job["finished_at"]:
                raise UserInputError(job["error"]["message"] if job["error"] else f"the job was {job['status']}.")
            time.sleep(_POLL_SECONDS)

    def show(self, name: str) -> dict[str, Any]:
        """What a task is made of."""
        return dict(self.call("GET", f"tasks/{_quote(name)}"))

    def ask(self, name: str, text: str, *, max_tokens: int = 256) -> str:
        """A model's answer to an input, at most so many tokens of it."""
        body = {"model": name, "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens}
        return str(self.call("POST", "chat/completions", body)["choices"][0]["message"]["content"])

    def classify(self, name: str, text: str) -> dict[str, float]:
        """Each label's probability, the most probable first."""
        return dict(self.call("POST", "classify", {"model": name, "input": text})["data"][0]["probabilities"])

    def models(self) -> list[str]:
        """Names of the models that can be called."""
        return [model["id"] for model in self.call("GET", "models")["data"]]

    def delete(self, name: str) -> None:
        """Delete a task."""
        self.call("DELETE", f"models/{_quote(name)}")


def _pick_new(events: list[dict[str, Any]], told: str | None) -> list[dict[str, Any]]:
    """Those of a job's events, newest first, that came after one that was told; oldest first."""
    return [*takewhile(lambda event: event["id"] != told, events)][::-1]


def _quote(name: str) -> str:
    return urllib.parse.quote(name, safe="")


def _form(name: str, content: bytes) -> bytes:
    """An upload's form; its boundary is its first 32 characters after the dashes."""
    boundary = secrets.token_hex(16)
    plain = "".join(letter for letter in name if letter.isprintable() and letter not in '"\\')
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    head += f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{plain}"\r\n\r\n'
    return head.encode() + content + f"\r\n--{boundary}--\r\n".encode()


def _read_message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"
