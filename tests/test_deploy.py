"""What deploy/ holds fits the command line, the service's limits and the package; systemd and nginx check it where they are."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from manyicl.cli import app
from manyicl.serving.guard import _FORM_BYTES
from manyicl.serving.settings import Limits
from manyicl.serving.vllm_backend import STOP_SECONDS
from test_docs import leaf_commands, parse_command, read

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNIT, PROXY, CONTAINER = DEPLOY / "manyicl.service", DEPLOY / "nginx.conf", DEPLOY / "Dockerfile"
PROGRAM = "/opt/manyicl/bin/manyicl"
# What a service takes at most to stop: requests in flight, then vLLM behind it.
DRAIN_SECONDS = Limits().drain_seconds + STOP_SECONDS


def read_unit() -> configparser.SectionProxy:
    """What a systemd unit says of its service."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(read(UNIT))
    return unit["Service"]


def instructions(name: str) -> list[str]:
    """What stands behind an instruction of the container file, each time that it stands there."""
    text = read(CONTAINER).replace("\\\n", " ")
    return re.findall(rf"^{name}\s+(.*)$", text, flags=re.MULTILINE)


def find(pattern: str, path: Path) -> str:
    """The one place of a file that a pattern finds."""
    (found,) = re.findall(pattern, read(path), flags=re.MULTILINE)
    return str(found)


def default_of(option: str) -> object:
    """The default of an option of `manyicl serve`."""
    serve = dict(leaf_commands(get_command(app)))["manyicl serve"]
    (default,) = [parameter.default for parameter in serve.params if parameter.name == option]
    return default


def test_the_commands_of_the_unit_and_the_container_parse() -> None:
    program, *options = shlex.split(read_unit()["ExecStart"])
    assert program == PROGRAM
    parse_command(shlex.join(["manyicl", *options]))
    (entry,), (command,) = instructions("ENTRYPOINT"), instructions("CMD")
    inside = [*json.loads(entry), *json.loads(command)]
    parse_command(shlex.join(inside))
    # Reached from outside the container, the service takes no request without keys.
    assert inside[inside.index("--host") + 1] == "0.0.0.0"
    assert "--api-keys" in inside


def test_the_unit_writes_only_where_it_may() -> None:
    unit = read_unit()
    options = shlex.split(unit["ExecStart"])
    assert (unit["ProtectSystem"], unit["ProtectHome"]) == ("strict", "true")
    assert options[options.index("--data-dir") + 1] == f"/var/lib/{unit['StateDirectory']}"
    assert unit["Environment"] == f"XDG_CACHE_HOME=/var/cache/{unit['CacheDirectory']}"


def test_a_stop_waits_for_requests_in_flight() -> None:
    assert float(read_unit()["TimeoutStopSec"]) > DRAIN_SECONDS
    assert float(find(r"--stop-timeout (\d+)", CONTAINER)) > DRAIN_SECONDS
    assert read_unit()["KillMode"] == "mixed"


def test_the_proxy_lets_through_what_the_service_takes() -> None:
    assert int(find(r"client_max_body_size (\d+)m;", PROXY)) * 2**20 >= Limits().max_file_bytes + _FORM_BYTES
    assert float(find(r"proxy_read_timeout (\d+)s;", PROXY)) > Limits().request_seconds
    assert find(r"proxy_buffering (\w+);", PROXY) == "off"
    assert find(r"proxy_set_header (.+);", PROXY) == "Host $server_name"  # By which a service without keys knows strangers.
    assert "location = /metrics {\n        deny all;" in read(PROXY)


def test_all_speak_of_the_port_that_the_service_listens_on() -> None:
    port = default_of("port")
    assert find(r"proxy_pass http://127\.0\.0\.1:(\d+);", PROXY) == str(port)
    assert instructions("EXPOSE") == [str(port)]
    assert f"http://127.0.0.1:{port}/readyz" in instructions("HEALTHCHECK")[0]
    assert f"--publish 127.0.0.1:{port}:{port}" in read(CONTAINER)


def test_the_container_copies_and_installs_what_there_is() -> None:
    package = tomllib.loads(read(ROOT / "pyproject.toml"))
    sources = [source for line in instructions("COPY") for source in shlex.split(line)[:-1]]
    assert {"src", "pyproject.toml", package["project"]["readme"], *package["project"]["license-files"]} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    extras = re.search(r"/source\[([\w,]+)\]", read(CONTAINER))
    assert extras is not None
    assert set(extras[1].split(",")) <= set(package["project"]["optional-dependencies"])
    assert instructions("FROM")[0] == f"python:{package['project']['requires-python'].removeprefix('>=')}-slim"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is absent: apt-get install systemd")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    def verify(text: str) -> list[str]:
        path = tmp_path / UNIT.name
        path.write_text(text.replace(PROGRAM, "/bin/true"), encoding="utf-8")
        done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, timeout=60)
        return [line for line in (done.stdout + done.stderr).splitlines() if UNIT.name in line]

    assert verify(read(UNIT)) == []
    (told,) = verify(read(UNIT).replace("KillMode=", "KillMood="))
    assert "Unknown key" in told


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is absent: apt-get install nginx-light")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is absent: apt-get install openssl")
def test_nginx_takes_its_file(tmp_path: Path) -> None:
    certificate, key = tmp_path / "models.pem", tmp_path / "models.key"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=models.example.com"]
    subprocess.run([*made, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True, timeout=60)

    def test(text: str) -> subprocess.CompletedProcess[str]:
        # Not the port of the machine's own nginx, and its folders, which only root may use.
        own = text.replace("/etc/ssl/models.pem", str(certificate)).replace("/etc/ssl/models.key", str(key))
        own = own.replace("listen 443", "listen 127.0.0.1:18443")
        folders = "".join(f"{name}_temp_path {tmp_path}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        whole = tmp_path / "nginx.conf"
        head = f"pid {tmp_path}/pid; error_log stderr; events {{}}"
        whole.write_text(f"{head} http {{ access_log off; {folders} {own} }}", encoding="utf-8")
        return subprocess.run(["nginx", "-t", "-c", str(whole)], capture_output=True, text=True, timeout=60)

    done = test(read(PROXY))
    assert done.returncode == 0, done.stderr
    assert "unknown directive" in test(read(PROXY).replace("proxy_buffering", "proxy_bufering")).stderr
