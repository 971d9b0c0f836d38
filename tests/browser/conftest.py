"""The page of a running service in Chromium, light and 1,200 pixels wide."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browser_fixtures import Opened, SteppedBackend
from manyicl.serving import jobs
from manyicl.serving.settings import Settings
from serving_fixtures import serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture
def backend(tmp_path: Path) -> SteppedBackend:
    return SteppedBackend(tmp_path / "fake", context_tokens=5000)


@pytest.fixture
def address(tmp_path: Path, backend: SteppedBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(jobs, "_PROGRESS_SECONDS", 0)
    with serving(Settings(tmp_path / "data"), backend) as address:
        yield address


@pytest.fixture
def opened(browser: "Browser", address: str) -> Iterator[Opened]:
    found = Opened(browser, address, viewport={"width": 1200, "height": 900}, color_scheme="light")
    yield found
    found.context.close()
