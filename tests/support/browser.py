"""A headless Chromium, spoken to through two pipes (``--remote-debugging-pipe``): JSON messages,
each ended by a zero byte."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATH = next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab."""

    def __init__(self, send: int, receive: Any) -> None:
        self._send, self._receive, self._count, self._session = send, receive, 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The browser's answer to a command; events that come first are kept in ``events``."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, url: str, width: int, height: int) -> None:
        """And wait until all that it asks for has come, or failed."""
        phone = {"deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, **phone)
        self.events.clear()
        self.ask("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._next())

    def evaluate(self, expression: str) -> Any:
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.ask("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> bytes:
        data = base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(data)
        return data

    def troubles(self) -> list[str]:
        """Resources that did not come, and errors of scripts."""
        found = []
        for event in self.events:
            method, about = event.get("method"), event.get("params", {})
            if method == "Network.loadingFailed" and not about.get("canceled"):
                found.append(f"{about['type']}: {about['errorText']}")
            elif method == "Network.responseReceived" and about["response"]["status"] >= 400:
                found.append(f"{about['response']['status']}: {about['response']['url']}")
            elif method == "Runtime.exceptionThrown":
                found.append(about["exceptionDetails"]["text"])
        return found

    def asked_for(self) -> list[str]:
        sent = (e for e in self.events if e.get("method") == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def _next(self) -> dict[str, Any]:
        line = bytearray()
        while (byte := self._receive.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            line += byte
        message: dict[str, Any] = json.loads(line)
        return message


@contextmanager
def page(folder: Path) -> Iterator[Page]:
    """A tab of a browser of its own, whose profile is ``folder``."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()

    def third_and_fourth() -> None:
        copies = os.dup(theirs_in), os.dup(theirs_out)
        os.dup2(copies[0], 3), os.dup2(copies[1], 4)

    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += ["--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
    assert PATH
    process = subprocess.Popen(
        [PATH, *options, "about:blank"],
        preexec_fn=third_and_fourth,
        pass_fds=(3, 4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in), os.close(theirs_out)
    try:
        with open(ours_in, "rb") as receive:
            yield Page(ours_out, receive)
    finally:
        process.kill()
        process.wait()
        os.close(ours_out)
