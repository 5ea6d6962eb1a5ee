"""A real browser for tests, the system's chromium, headless; web servers of files and of runs."""

import asyncio
import functools
import http.server
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agq.pipeline.dashboard.runs import Runs
from agq.pipeline.dashboard.server import Dashboard, serve

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# Software WebGL: test machines have no GPU.
FLAGS = [
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--disable-background-networking",
]


@contextmanager
def browser_page(width: int = 1300, height: int = 900) -> Iterator[Any]:
    """Open a browser page that fails the test on any script error; skip where no browser is."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (apt install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(60_000)
            errors: list[str] = []
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("dialog", lambda dialog: errors.append(f"dialog {dialog.message}"))
            yield page
            assert errors == []
        finally:
            browser.close()


def screenshot(viewer: Any, tmp_path: Path) -> np.ndarray:
    """Open a neuroglancer viewer in a real browser and return the picture (height, width, 3)."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-first-run", *FLAGS]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    browser = subprocess.Popen(
        [*command, profile, "--window-size=900,700", str(viewer)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        taken: dict[str, Any] = {}

        def take() -> None:
            taken["answer"] = viewer.screenshot(size=[800, 600])

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        thread.join(90)
        assert "answer" in taken, "the browser took no screenshot in 90 s"
    finally:
        browser.terminate()
        browser.wait(20)
    (tmp_path / "view.png").write_bytes(taken["answer"].screenshot.image)
    return taken["answer"].screenshot.image_pixels[..., :3].astype(int)


class _Readable(http.server.SimpleHTTPRequestHandler):
    """Files of a folder and parts of them, for pages of any origin, as a lab's web server would."""

    def do_GET(self) -> None:
        file, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        if wanted is None or not file.is_file():
            super().do_GET()
            return
        data = file.read_bytes()
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(data) - int(last))
        part = data[start : int(last) + 1 if first and last else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def do_OPTIONS(self) -> None:
        self.send_response(204)
        self.send_header("Access-Control-Allow-Headers", "Range")
        self.end_headers()

    def end_headers(self) -> None:
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Access-Control-Expose-Headers", "Content-Range")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """Serve a folder; yield its address."""
    handler = functools.partial(_Readable, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def serving(runs: Runs, **options: Any) -> Iterator[Dashboard]:
    """Serve the page of runs in a thread of its own."""
    ready = threading.Event()
    made: dict[str, Any] = {}

    async def main() -> None:
        made["loop"], made["task"] = asyncio.get_running_loop(), asyncio.current_task()

        def announce(page: Dashboard) -> None:
            made["page"] = page
            ready.set()

        await serve(runs, announce=announce, **options)

    def body() -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(main())

    thread = threading.Thread(target=body)
    thread.start()
    assert ready.wait(20)
    try:
        yield made["page"]
    finally:
        made["loop"].call_soon_threadsafe(made["task"].cancel)
        thread.join(20)
