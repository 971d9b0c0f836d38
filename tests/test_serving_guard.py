"""Nobody comes in without a key, nobody reaches another's, and no request is too large, deep or strange to be refused well."""

import http.client
import io
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import filelock
import pytest

from manyicl.errors import ManyICLError, UserInputError
from manyicl.serving import guard
from manyicl.serving import keys as keys_module
from manyicl.serving.app import create_app
from manyicl.serving.keys import KeyRing, add_key, hash_key, read_keys
from manyicl.serving.observing import JsonFormatter
from manyicl.serving.settings import Limits, Settings, is_loopback
from serving_fixtures import TICKETS, FakeBackend, chat_file, serving, wait_for
from test_files import largest_file

LIMITS = Limits(max_body_bytes=20_000, max_file_bytes=50_000, max_text_chars=500, max_inputs=3, max_examples=20)


class Caller:
    """Requests of one key, as they are, to one service."""

    def __init__(self, address: str, key: str | None = None) -> None:
        self.host, self.port = urlsplit(address).hostname or "", urlsplit(address).port or 0
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, content and headers of the answer to a body that is bytes or becomes JSON."""
        given = self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body, given = json.dumps(body).encode(), {"Content-Type": "application/json"} | given
        connection = http.client.HTTPConnection(self.host, self.port, timeout=20)
        try:
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, json.loads(content) if found.get("content-type") == "application/json" else content, found

    def upload(self, content: bytes, *, name: str = "t.jsonl", purpose: str = "fine-tune") -> tuple[int, Any, dict[str, str]]:
        head = f'--e\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n'
        head += f'--e\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        return self(
            "POST", "/v1/files", head.encode() + content + b"\r\n--e--\r\n", Content_Type="multipart/form-data; boundary=e"
        )

    def make_model(self, name: str = "tickets") -> tuple[str, str]:
        """Ids of a file and of the job that made a model of it."""
        file_id = self.upload(chat_file(TICKETS))[1]["id"]
        job_id = self("POST", "/v1/fine_tuning/jobs", {"training_file": file_id, "suffix": name})[1]["id"]
        wait_for(lambda: self("GET", f"/v1/fine_tuning/jobs/{job_id}")[1]["status"] == "succeeded")
        return file_id, job_id


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    return {tenant: add_key(tmp_path / "keys.txt", tenant) for tenant in ("acme", "other")}


@pytest.fixture
def address(tmp_path: Path, keys: dict[str, str]) -> Iterator[str]:
    settings = Settings(tmp_path / "data", api_keys=tmp_path / "keys.txt", limits=LIMITS)
    with serving(settings, FakeBackend(tmp_path / "fake")) as address:
        yield address


@pytest.fixture
def call(address: str, keys: dict[str, str]) -> Caller:
    return Caller(address, keys["acme"])


def routes(tmp_path: Path) -> list[tuple[str, str]]:
    """Every method and path template of the application, in its OpenAPI document or not."""
    app = create_app(Settings(tmp_path / "unused"), FakeBackend(tmp_path / "unused"))
    waiting, found = list(app.routes), []
    while waiting:
        route: Any = waiting.pop(0)
        waiting += getattr(getattr(route, "original_router", route), "routes", None) or []  # FastAPI 0.165 keeps routers whole.
        found += [(method.lower(), route.path) for method in getattr(route, "methods", None) or () if method != "HEAD"]
    return found


def error_of(answer: tuple[int, Any, dict[str, str]]) -> dict[str, Any]:
    status, content, _ = answer
    assert set(content) == {"error"}, (status, content)
    assert set(content["error"]) == {"message", "type", "param", "code"}
    return dict(content["error"])


BODIES: dict[str, Any] = {
    "/v1/fine_tuning/jobs": {"training_file": "FILE", "suffix": "mine"},
    "/v1/chat/completions": {"model": "tickets", "messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"model": "tickets", "prompt": "x"},
    "/v1/classify": {"model": "tickets", "input": "x"},
    "/v1/tasks/{name}/examples": {"examples": [{"input": "x", "answer": "bug"}]},
    "/v1/tasks/{name}/quality": {},
    "/v1/fine_tuning/jobs/{job_id}/cancel": None,
}
# Addresses that answer with what is the caller's own: nothing of another's can be asked for.
LISTS = {("get", "/v1/files"), ("post", "/v1/files"), ("get", "/v1/fine_tuning/jobs"), ("get", "/v1/models")}
LISTS |= {("post", "/v1/examples/check")}


def test_every_address_needs_a_key_or_is_known_not_to(tmp_path: Path, address: str) -> None:
    found = routes(tmp_path)
    assert len(found) >= 24
    without, wrong = Caller(address), Caller(address, "mi-wrong")
    for method, template in found:
        path = re.sub(r"\{\w+\}", "x", template)
        if template in guard.PUBLIC:
            assert without(method.upper(), path)[0] == 200
            continue
        for caller, code in ((without, "missing_api_key"), (wrong, "invalid_api_key")):
            answer = caller(method.upper(), path)
            assert (answer[0], error_of(answer)["code"]) == (401, code), (method, template)
            assert answer[2]["www-authenticate"] == "Bearer"
    # Closed before anything is looked up, so that a stranger does not learn which addresses exist.
    assert without("GET", "/v1/nothing")[0] == without("GET", "/nothing")[0] == without("BREW", "/v1/models")[0] == 401


def test_every_address_refuses_another_tenants_names_and_ids(
    tmp_path: Path, address: str, call: Caller, keys: dict[str, str]
) -> None:
    file_id, job_id = call.make_model()
    theirs = {"file_id": file_id, "job_id": job_id, "model": "tickets", "name": "tickets"}
    nobodys = {"file_id": f"file-{'0' * 24}", "job_id": f"ftjob-{'0' * 24}", "model": "unknown", "name": "unknown"}

    def exchange(text: str) -> str:
        for field, value in theirs.items():
            text = text.replace(value, nobodys[field])
        return text

    other = Caller(address, keys["other"])
    tried = 0
    for method, template in routes(tmp_path):
        if ("{" not in template and template not in BODIES) or (method, template) in LISTS:
            continue  # Names nothing.
        body = BODIES.get(template)
        if body and "training_file" in body:
            body = body | {"training_file": file_id}
        asked = [(template.format(**theirs), body), (template.format(**nobodys), json.loads(exchange(json.dumps(body))))]
        assert asked[0] != asked[1], template
        found = [other(method.upper(), *each) for each in asked]
        assert [answer[0] for answer in found] == [404, 404], (method, template, found)
        assert exchange(json.dumps(error_of(found[0]))) == json.dumps(error_of(found[1])), (method, template)
        tried += 1
    assert tried == 16
    for path in ("/v1/files", "/v1/fine_tuning/jobs"):
        assert other("GET", path)[1]["data"] == []
        # Not even as the place from which a list goes on.
        assert other("GET", f"{path}?after={file_id if path == '/v1/files' else job_id}")[0] == 404
    assert call("GET", "/v1/tasks/tickets")[1]["num_examples"] == 6
    assert call("GET", f"/v1/files/{file_id}")[0] == 200


def test_every_address_but_pages_is_in_the_openapi_document(tmp_path: Path) -> None:
    app = create_app(Settings(tmp_path / "unused"), FakeBackend(tmp_path / "unused"))
    documented = {(method, path) for path, operations in app.openapi()["paths"].items() for method in operations}
    assert {(method, path) for method, path in routes(tmp_path) if path.startswith("/v1/")} <= documented <= set(routes(tmp_path))
    for path, operations in app.openapi()["paths"].items():
        for operation in operations.values():
            assert {"200", "400", "401", "404", "413", "429"} <= set(operation["responses"]), path
            assert "422" not in operation["responses"]


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "zstd", "GZIP"])
def test_a_compressed_body_is_refused(call: Caller, encoding: str) -> None:
    answer = call(
        "POST", "/v1/classify", b"\x1f\x8b\x08" + b"\0" * 100, Content_Type="application/json", Content_Encoding=encoding
    )
    assert (answer[0], error_of(answer)["code"]) == (415, "unsupported_encoding")


def test_a_body_beyond_its_limit_is_refused_before_it_is_read(call: Caller) -> None:
    answer = call("POST", "/v1/classify", b"", Content_Type="application/json", Content_Length="9" * 18)
    assert (answer[0], error_of(answer)["code"]) == (413, "body_too_large")
    assert error_of(answer)["message"] == "The request's body is longer than 20000 bytes. Send less at once."
    upload = call("POST", "/v1/files", b"", Content_Type="multipart/form-data; boundary=e", Content_Length="200000")
    assert upload[0] == 413
    chunked = call(
        "POST", "/v1/classify", iter_body(b"x" * 1000, 30), Content_Type="application/json", Transfer_Encoding="chunked"
    )
    assert chunked[0] == 413
    assert call.upload(b"x" * 50_000)[0] == 200


def iter_body(part: bytes, count: int) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for _ in range(count)) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"[" * 15_000, "invalid_body"),
        (b"[" * 9_000 + b"]" * 9_000, None),
        (b'{"a":' * 3_000 + b"1" + b"}" * 3_000, None),
        (b'{"model": "tickets", "input": "\xff\xfe"}', None),
        (b'{"model": "tickets", "input": "\\ud800"}', "invalid_value"),
        (b'{"model": "tickets", "input": NaN}', "invalid_value"),
        (b'{"model": "tickets", "input": ' + b"1" * 5000 + b"}", None),
        (b"{", "invalid_body"),
        (b"", "missing_required_parameter"),
        (b"[]", "invalid_value"),
        (b'{"model": "tickets", "input": []}', "invalid_value"),
        (b'{"model": "tickets", "input": ["a", "b", "c", "d"]}', "too_many_inputs"),
        (b'{"model": "tickets", "input": "  "}', "invalid_value"),
        (b'{"model": "tickets", "input": "' + b"x" * 600 + b'"}', "invalid_value"),
        (b'{"model": "tickets", "input": "x", "\\ud800": 1}', "invalid_value"),
        (b'{"model": 5, "input": "x"}', "invalid_value"),
    ],
)
def test_a_strange_body_is_refused_with_400(call: Caller, body: bytes, code: str | None) -> None:
    call.make_model()
    answer = call("POST", "/v1/classify", body, Content_Type="application/json")
    assert answer[0] == 400, answer
    error = error_of(answer)
    assert error["type"] == "invalid_request_error"
    if code is not None:
        assert error["code"] == code, error


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files/../../etc/passwd",
        "/v1/files/..%2f..%2fservice.sqlite",
        "/v1/files/%2e%2e%2f.lock/content",
        "/v1/files/file-%00/content",
        "/v1/models/..%2f..%2fkeys.txt",
        "/v1/models/x'%20OR%20'1'='1",
        "/v1/tasks/%ff%fe",
        "/v1/fine_tuning/jobs/1;DROP%20TABLE%20jobs",
        "/v1/tasks/x%0d%0aSet-Cookie:%20a=b",
        "//v1/models",
    ],
)
def test_strange_names_are_not_found(call: Caller, path: str) -> None:
    answer = call("GET", path)
    assert (answer[0], error_of(answer)["type"]) == (404, "invalid_request_error")
    assert "set-cookie" not in answer[2]


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 65, "a/b", "é", ".hidden", "x\x00", "a\nb"])
def test_strange_model_names_are_refused(call: Caller, name: str) -> None:
    file_id = call.upload(chat_file(TICKETS))[1]["id"]
    answer = call("POST", "/v1/fine_tuning/jobs", {"training_file": file_id, "suffix": name})
    assert (answer[0], error_of(answer)["param"]) == (400, "suffix")


def test_methods_and_addresses_that_are_not_there_have_the_same_shape(call: Caller) -> None:
    wrong_method = call("PUT", "/v1/models")
    assert (wrong_method[0], error_of(wrong_method)["code"], wrong_method[2]["allow"]) == (405, "method_not_allowed", "GET")
    assert error_of(call("GET", "/v1/nothing"))["code"] == "unknown_url"
    assert error_of(call("GET", "/v1/models/"))["code"] == "unknown_url"


def test_an_upload_is_checked(call: Caller) -> None:
    assert error_of(call.upload(b""))["message"] == "The file is empty."
    assert error_of(call.upload(b"x", purpose="assistants"))["param"] == "purpose"
    assert call("POST", "/v1/files", {"file": "x", "purpose": "fine-tune"})[0] == 415
    assert call("POST", "/v1/files", b"nonsense", Content_Type="multipart/form-data; boundary=e")[0] == 400
    assert call("POST", "/v1/files", b"nonsense", Content_Type="multipart/form-data")[0] == 400
    assert call.upload(b"x", name="a" * 1000 + ".jsonl")[1]["filename"] == "a" * 194 + ".jsonl"


def test_answers_have_an_id_and_name_no_server(call: Caller) -> None:
    headers = call("GET", "/v1/models", X_Request_Id="theirs")[2]
    assert re.fullmatch("req-[0-9a-f]{24}", headers["x-request-id"])


def test_logs_hold_no_key_and_no_text(
    tmp_path: Path, call: Caller, keys: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    call.make_model("private-name")
    assert call("POST", "/v1/classify", {"model": "private-name", "input": "a secret input"})[0] == 200
    assert call("POST", "/v1/classify", {"model": "private-name", "input": 5})[0] == 400
    wait_for(lambda: [getattr(record, "status", 0) for record in caplog.records].count(400) == 1)
    shown = io.StringIO()
    for record in caplog.records:
        if not record.name.startswith("asyncio"):
            shown.write(JsonFormatter().format(record) + "\n")
    lines = [json.loads(line) for line in shown.getvalue().splitlines()]
    classified = [line for line in lines if line.get("route") == "/v1/classify"]
    assert [(line["method"], line["status"], line["tenant"]) for line in classified] == [
        ("POST", 200, "acme"),
        ("POST", 400, "acme"),
    ]
    for private in (*keys.values(), "secret input", "private-name", "charged twice", hash_key(keys["acme"])):
        assert private not in shown.getvalue()


def test_a_failure_nobody_foresaw_is_answered_and_logged_without_its_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = FakeBackend(tmp_path / "fake")
    question = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
    with serving(Settings(tmp_path / "data"), backend) as address:
        call = Caller(address)
        backend.failure = ManyICLError("http://inside:9000 does not answer")
        away = call("POST", "/v1/chat/completions", question)
        assert (away[0], error_of(away)["code"], "inside" in error_of(away)["message"]) == (503, "model_unavailable", False)
        caplog.clear()
        backend.failure = ValueError("a user's text")
        answer = call("POST", "/v1/chat/completions", question)
    assert (answer[0], error_of(answer)["code"], error_of(answer)["type"]) == (500, "internal_error", "server_error")
    assert "text" not in error_of(answer)["message"]
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage() == "ValueError in a request"
    line = json.loads(JsonFormatter().format(record))
    assert "_work" in line["traceback"]
    assert "a user's text" not in json.dumps(line)


def test_a_client_that_leaves_in_the_middle_of_an_upload_is_no_failure(
    tmp_path: Path, call: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with socket.create_connection((call.host, call.port)) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: {call.headers['Authorization']}\r\n"
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=e\r\nContent-Length: 9999\r\n\r\n--e".encode())
        time.sleep(0.1)
    wait_for(lambda: [getattr(record, "status", 0) for record in caplog.records] == [499])
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    assert call("GET", "/v1/files")[1]["data"] == []


def test_a_disk_that_fills_during_an_upload_keeps_nothing(tmp_path: Path) -> None:
    with serving(Settings(tmp_path / "data"), FakeBackend(tmp_path / "fake")) as address:
        call = Caller(address)
        assert call.upload(b"x" * 1000)[0] == 200
        with largest_file(8_000_000):
            for size in (20_000_000, 7_999_999):
                answer = call.upload(b"x" * size)
                assert answer[0] == (507 if size > 8_000_000 else 200)
        assert error_of(call.upload(b""))["code"] == "invalid_file"
        assert [file["bytes"] for file in call("GET", "/v1/files")[1]["data"]] == [7_999_999, 1000]
        assert len(list((tmp_path / "data" / "files").iterdir())) == 2


def test_metrics_are_prometheus_text(tmp_path: Path) -> None:
    with serving(Settings(tmp_path / "data"), FakeBackend(tmp_path / "fake")) as address:
        call = Caller(address)
        call.make_model()
        call("GET", "/v1/models/private-name")
        status, content, headers = call("GET", "/metrics")
    lines = content.decode().splitlines()
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert 'manyicl_requests_total{method="POST",route="/v1/files",status="200"} 1.0' in lines
    assert 'manyicl_requests_total{method="GET",route="/v1/models/{model}",status="404"} 1.0' in lines
    assert 'manyicl_jobs{status="succeeded"} 1.0' in lines
    assert {"manyicl_queries_waiting 2.0", "manyicl_cached_tokens_total 100.0", 'manyicl_batches_total{queries="4"} 5.0'} <= {
        *lines
    }
    assert "private-name" not in content.decode()


def test_without_keys_the_service_stays_on_this_machine(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"--host 0\.0\.0\.0 is reached from other machines") as raised:
        create_app(Settings(tmp_path, host="0.0.0.0"), FakeBackend(tmp_path))
    assert "manyicl keys add TENANT --file keys.txt" in str(raised.value)
    assert [host for host in ("127.0.0.1", "::1", "localhost", "127.8.9.1", "[::1]") if not is_loopback(host)] == []
    assert [host for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", "") if is_loopback(host)] == []


def test_without_keys_a_page_of_another_site_cannot_ask(tmp_path: Path) -> None:
    with serving(Settings(tmp_path / "data"), FakeBackend(tmp_path / "fake")) as address:
        call = Caller(address)
        assert call("GET", "/v1/models")[0] == 200
        assert call("GET", "/v1/models", Origin="http://localhost:3000")[0] == 200
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Host": "evil.example"},
            {"Origin": "http://[x"},
        ):
            answer = call("POST", "/v1/files", b"x", **headers)
            assert (answer[0], error_of(answer)["code"]) == (403, "not_local")


def test_keys_are_hashed_at_rest_and_revoked_by_removing_a_line(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    first, second = add_key(path, "acme"), add_key(path, "other")
    assert first != second
    assert len(first) == 46
    text = path.read_text()
    assert first not in text
    assert re.search(rf"^acme {hash_key(first)} \d{{4}}-\d\d-\d\d$", text, flags=re.MULTILINE)
    ring = KeyRing(path)
    assert [ring.find_tenant(key) for key in (first, second, first + "x", "", "\udcff")] == ["acme", "other", None, None, None]
    path.write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith("acme")))
    assert [ring.find_tenant(key) for key in (first, second)] == [None, "other"]
    path.write_text("broken\n")
    assert ring.find_tenant(second) == "other"
    path.unlink()
    assert ring.find_tenant(second) is None
    path.write_text("broken\n")
    assert ring.find_tenant(second) is None
    third = hash_key("mi-third")
    path.write_text(f"# kept by hand\n\nacme {third}\n")
    assert [ring.find_tenant(key) for key in (second, "mi-third")] == [None, "acme"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acme", ":1: not a tenant's name and a SHA-256"),
        ("\nacme mi-notahash", ":2: not a tenant's name"),
        (f"ACME {'0' * 64}", ":1: not a tenant's name"),
        ("# none", ": holds no key, so nobody could come in"),
    ],
)
def test_a_broken_file_of_keys_is_told_without_showing_it(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(text)
    with pytest.raises(UserInputError) as raised:
        KeyRing(path)
    assert message in str(raised.value)
    assert "mi-notahash" not in str(raised.value)
    path.unlink()
    with pytest.raises(UserInputError, match="the keys cannot be read"):
        KeyRing(path)


def test_a_file_of_keys_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    first = add_key(path, "acme")
    path.chmod(0o600)
    second = add_key(path, "acme")
    assert path.stat().st_mode & 0o777 == 0o600
    assert [KeyRing(path).find_tenant(key) for key in (first, second)] == ["acme", "acme"]


def test_keys_are_added_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "_LOCK_SECONDS", 0.05)
    path = tmp_path / "keys.txt"
    with filelock.FileLock(f"{path}.lock"), pytest.raises(UserInputError, match="another process has been adding a key"):
        add_key(path, "acme")
    assert not path.exists()
    key = add_key(path, "acme")
    assert KeyRing(path).find_tenant(key) == "acme"


def test_a_tenants_name_is_plain(tmp_path: Path) -> None:
    for name in ("", "A", "a b", "x" * 65, "a\n"):
        with pytest.raises(UserInputError, match="use 1 to 64 small letters"):
            add_key(tmp_path / "keys.txt", name)
    assert not (tmp_path / "keys.txt").exists()
    add_key(tmp_path / "keys.txt", "a-1_b")
    assert [tenant for _, tenant in read_keys(tmp_path / "keys.txt")] == ["a-1_b"]
