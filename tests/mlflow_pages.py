"""MLflow's pages in a headless browser, as a person would see them.

Written for the pages of MLflow 3.17: routes and texts may change with a version, which is why the same facts are tested
through the client as well.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from PIL import Image

CHROMIUM = os.environ.get("MEMGEN_CHROMIUM", "/usr/bin/chromium")
PATIENCE = 120_000
"""Milliseconds: a busy machine draws sixty charts without a GPU."""
LARGEST = 150_000
"""Bytes of a screenshot."""

_DRAWN = "document.querySelectorAll('.scatterlayer .trace').length"


class Pages:
    """A browser on a server.

    Args:
        playwright: the running driver.
        uri: of the server.
        profile: folder of the browser's profile.
        screenshots: where screenshots go.
    """

    def __init__(self, playwright: Any, uri: str, profile: Path, screenshots: Path) -> None:
        self._uri = uri
        self._screenshots = screenshots
        self._context = playwright.chromium.launch_persistent_context(
            str(profile),
            executable_path=CHROMIUM,
            # Root has no sandbox; a container has little shared memory.
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
            viewport={"width": 1200, "height": 760},
        )
        self._context.set_default_timeout(PATIENCE)
        self.page = self._context.new_page()
        self.page.goto(uri)
        self._see("Experiments")
        # The pages for training, not those for prompts; a fresh profile opens a pane that covers a quarter.
        self.page.get_by_text("Model training").first.click()
        self._close_assistant()

    def close(self) -> None:
        """Ends the browser."""
        self._context.close()

    def open(self, route: str, *texts: str) -> None:
        """Opens a page and waits until it shows the texts."""
        self.page.goto(f"{self._uri}/#{route}")
        for text in texts:
            self._see(text)

    def open_trace(self, route: str, question: str) -> str:
        """Opens the first trace of a list that answers a question; its text."""
        self.open(route, question)
        self.page.get_by_text(question).first.click()
        self._see("turn 1")
        self.page.get_by_text("turn 1").first.click()
        self._see("latents⟧")
        return self.text()

    def artifact_text(self, route: str) -> str:
        """The HTML of a page among the artifacts, as the browser shows it inside of MLflow's page."""
        self.open(route, "Path:")
        frame = self.page.frame_locator("iframe").first
        frame.locator("mark").first.wait_for()
        html: str = frame.locator("body").inner_html()
        return html

    def unfold(self, name: str) -> None:
        """Shows the children of a run in a list."""
        self._see(name)
        row = self.page.locator(".ag-row").filter(has_text=name)
        row.locator("button").first.click()

    def search_charts(self, search: str) -> None:
        """Leaves only the charts whose metrics or images have such a name."""
        self.page.get_by_placeholder("Search metric charts").fill(search)
        self.page.mouse.move(0, 0)

    def charts(self) -> int:
        """How many charts have drawn something; waits for the first."""
        self.page.wait_for_function(f"{_DRAWN} > 0", timeout=PATIENCE)
        self.page.wait_for_timeout(2000)
        count: int = self.page.evaluate(_DRAWN)
        return count

    def wait_for(self, text: str) -> str:
        """All text of the page, once it shows this one."""
        self._see(text)
        return self.text()

    def text(self) -> str:
        """All text of the page on one line, as it reads."""
        return " ".join(self.page.inner_text("body").split()).replace(" :", ":")

    def shoot(self, name: str) -> Path:
        """A screenshot of the page, small enough for a repository."""
        self.page.mouse.move(0, 0)
        self.page.wait_for_timeout(1500)
        self._close_assistant()
        raw = self.page.screenshot(timeout=PATIENCE, animations="disabled")
        path = self._screenshots / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(io.BytesIO(raw)) as image:
            image.convert("RGB").quantize(64).save(path, optimize=True)
        assert path.stat().st_size <= LARGEST, f"{path} has {path.stat().st_size} bytes"
        return path

    def _see(self, text: str) -> None:
        self.page.get_by_text(text).first.wait_for()

    def _close_assistant(self) -> None:
        button = self.page.locator("[data-component-id*=assistant][data-component-id*=close]")
        if button.count():
            button.first.click()
