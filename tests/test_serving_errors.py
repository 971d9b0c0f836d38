"""What went wrong inside is told apart, answered without its text, and logged."""

import errno
import json
import logging
import os

import pytest
from safetensors import SafetensorError

from manyicl.errors import StorageError
from manyicl.serving.backends import ShortMemoryError
from manyicl.serving.errors import error_response, find_errno, has_no_space
from manyicl.serving.observing import JsonFormatter


def caused(cause: Exception | None) -> StorageError:
    error = StorageError("/data/private: cannot be written.")
    error.__cause__ = cause
    return error


def system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("error", "status", "code", "event", "number"),
    [
        (caused(system_error(errno.ENOSPC)), 507, "storage_full", "StorageError in a request: no space is left", errno.ENOSPC),
        (caused(system_error(errno.EDQUOT)), 507, "storage_full", "StorageError in a request: no space is left", errno.EDQUOT),
        (caused(None), 507, "storage_full", "StorageError in a request: no space is left", None),
        (caused(system_error(errno.EACCES)), 500, "internal_error", "StorageError in a request", errno.EACCES),
        (caused(system_error(errno.EROFS)), 500, "internal_error", "StorageError in a request", errno.EROFS),
        (system_error(errno.ENOSPC), 507, "storage_full", "OSError in a request: no space is left", errno.ENOSPC),
        (ShortMemoryError("needs 5 GB"), 503, "out_of_memory", "ShortMemoryError in a request", None),
    ],
)
def test_a_failure_is_logged_by_its_kind_and_number(
    error: Exception, status: int, code: str, event: str, number: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    answer = error_response(error)
    told = json.loads(bytes(answer.body))["error"]
    assert (answer.status_code, told["code"]) == (status, code)
    assert "private" not in told["message"]
    assert "5 GB" not in told["message"]
    [record] = caplog.records
    line = json.loads(JsonFormatter().format(record))
    assert (record.levelno, line["event"], line.get("errno")) == (logging.ERROR, event, number)


def test_the_systems_error_is_found_where_safetensors_tells_it() -> None:
    full = caused(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    denied = caused(SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"))
    assert [(find_errno(error), has_no_space(error)) for error in (full, denied)] == [(28, True), (13, False)]
