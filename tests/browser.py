"""A page in headless Chromium, driven over its pipe of the DevTools protocol: nothing but the standard library."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync
    --disable-component-update --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"""


class Page:
    """One tab. `ask(method, ...)` is a command of the protocol, `value(code)` an expression of JavaScript."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._left, self._numbers, self._session = b"", itertools.count(1), ""

    def ask(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self) -> Any:
        while b"\0" not in self._left:
            part = os.read(self._answers, 1 << 16)
            if not part:
                raise RuntimeError("Chromium has ended")
            self._left += part
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def attach(self) -> None:
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def open(self, address: str) -> None:
        self.ask("Page.navigate", url=address)

    def value(self, code: str) -> Any:
        found = self.ask("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, code: str, seconds: float = 300) -> Any:
        """The first value of an expression that is true; a page on a busy machine takes minutes to open."""
        return until(lambda: self.value(code), f"{code} on the page", seconds)

    def upload(self, selector: str, path: Path) -> None:
        self.ask("DOM.enable")
        root = self.ask("DOM.getDocument")["root"]["nodeId"]
        node = self.ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.ask("DOM.setFileInputFiles", nodeId=node, files=[str(path.resolve())])

    def slide(self, selector: str, value: int) -> None:
        """Moves a slider as a hand would: the value, and the events that follow it."""
        self.value(
            f"""(() => {{ const slider = document.querySelector({selector!r});
            const set = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set;
            set.call(slider, {value});
            for (const name of ['input', 'change', 'pointerup'])
                slider.dispatchEvent(new Event(name, {{bubbles: true}})); }})()"""
        )

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))


def until(look: Callable[[], Any], what: str, seconds: float) -> Any:
    """The first result that is true. Raises TimeoutError that says what there was not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.2)
    raise TimeoutError(f"no {what} in {seconds:g} seconds")


@contextlib.contextmanager
def chromium(width: int = 1100, height: int = 900) -> Iterator[Page]:
    """A tab of a browser of its own, which ends with the block."""
    assert CHROMIUM is not None
    to_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        browser = subprocess.Popen(
            ["bash", "-c", script, "chromium", *words],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            page = Page(commands, answers)
            page.attach()
            yield page
        finally:
            browser.terminate()
            browser.wait(20)
            os.close(commands)
            os.close(answers)
