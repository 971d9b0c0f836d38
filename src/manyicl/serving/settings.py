"""What `manyicl serve` was asked for, as plain data. Loads neither torch nor a web library."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from manyicl.errors import UserInputError

BASE_MODEL = "base"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


@dataclass(frozen=True)
class Limits:
    """What one request or one tenant may ask for; beyond it a request is refused with an error that names the limit.

    Attributes:
        max_body_bytes: Of any request but an upload.
        max_file_bytes: Of one uploaded file.
        max_files: Of one tenant.
        max_tasks: Of one tenant, those of unfinished jobs included.
        max_unfinished_jobs: Of one tenant.
        max_finished_jobs: Of one tenant; the oldest ones beyond are removed with their events, and the models stay.
        max_examples: Of one task.
        max_text_chars: Characters of one input, answer or instruction.
        max_inputs: Of one classification request.
        max_labels: Of one task.
        max_probabilities: Of one classification's answer: its inputs times the labels that are told of each.
        request_seconds: The longest that a request may take, unless it asks for less.
        drain_seconds: How long requests in flight may go on after the service was told to stop.
    """

    max_body_bytes: int = 8 * 2**20
    max_file_bytes: int = 64 * 2**20
    max_files: int = 1000
    max_tasks: int = 1000
    max_unfinished_jobs: int = 100
    max_finished_jobs: int = 1000
    max_examples: int = 20_000
    max_text_chars: int = 100_000
    max_inputs: int = 1000
    max_labels: int = 1000
    max_probabilities: int = 200_000
    request_seconds: float = 120.0
    drain_seconds: float = 30.0


@dataclass(frozen=True)
class Settings:
    """Where a service listens, keeps its data and finds its keys.

    Attributes:
        data_dir: Uploaded files, prefixes and, without a `database_url`, the database. One service at a time uses it.
        database_url: `postgresql://…`, or None for SQLite in `data_dir`.
        api_keys: The file of keys; None serves one tenant without keys, and then only on this machine.
    """

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Path | None = None
    database_url: str | None = None
    limits: Limits = field(default_factory=Limits)

    def check(self) -> None:
        """Refuse to be open to everyone.

        Raises:
            UserInputError: another host than this machine's own is asked for without keys.
        """
        if self.api_keys is None and not is_loopback(self.host):
            raise UserInputError(
                f"--host {self.host} is reached from other machines, and without --api-keys everyone there could read and change "
                "every task. Make a key with `manyicl keys add TENANT --file keys.txt` and give --api-keys keys.txt, or use "
                "--host 127.0.0.1."
            )


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own and reached from nowhere else."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
