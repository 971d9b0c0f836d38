"""The page of a service in Chromium, and a backend whose work waits until it is let go on."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyicl.serving.backends import Prepared, TaskSpec
from serving_fixtures import FakeBackend

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


class SteppedBackend(FakeBackend):
    """Computes the first 40 of 100 tokens, and the others when `gate` is opened."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.gate = threading.Event()
        self.gate.set()

    async def prepare(self, spec: TaskSpec, *, progress: Callable[[int, int], None] | None = None) -> Prepared:
        if progress is not None:
            progress(40, 100)
        while not self.gate.is_set():
            await asyncio.sleep(0.01)
        return await super().prepare(spec, progress=progress)


class Opened:
    """The page of a service, with what it has said and asked for."""

    def __init__(self, browser: "Browser", address: str, **options: Any) -> None:
        self.address = address
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(10_000)
        self.page: Page = self.context.new_page()
        self.said: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog {dialog.message}"))
        self.page.on("request", lambda request: self.hosts.add("/".join(request.url.split("/")[:3])))
        self.page.goto(address)

    def check(self, text: str) -> None:
        self.page.fill("#examples", text)
        self.page.click("#check")

    def make(self, content: bytes, name: str) -> None:
        self.check(content.decode())
        self.page.fill("#name", name)
        self.page.click("#create")
        self.page.wait_for_selector("#task:visible")

    def ask(self, text: str) -> None:
        self.page.fill("#query", text)
        self.page.click("#ask")

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]

    def until(self, expression: str) -> None:
        """Wait for an expression to be true; Playwright's own way evaluates text in the page, which its policy forbids."""
        for _ in range(500):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"waited in vain for {expression}")

    def error(self, name: str) -> str:
        self.page.wait_for_selector(f"#{name}-error:visible")
        return self.page.inner_text(f"#{name}-error")
