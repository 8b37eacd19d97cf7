"""A real browser without a window, driven by Chrome's DevTools protocol over a pipe: no port, no other library."""

import base64
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from tests.services.programs import need_programs

SECONDS = 60.0


class Chromium:
    """One tab. What its pages complained of and asked for since the latest `open` is in `complaints` and `requests`."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._messages = to_browser, Queue[dict[str, Any] | None]()
        self._number, self._session = 0, ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        threading.Thread(target=self._read, args=(from_browser,), daemon=True).start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Return the result of a method of the protocol; RuntimeError if the browser refuses it."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def open(self, page: Path, *, width: int, height: int = 800, scheme: str = "light", script: bool = True) -> None:
        """Load a file in a window of `width` pixels that prefers a colour scheme, and wait until it is whole."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call("Page.navigate", url="about:blank")
        self.complaints.clear()
        self.requests.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key that has no character."""
        code = {"ArrowRight": 39, "ArrowLeft": 37, "End": 35, "Home": 36}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write what the window shows, or the whole page, as a PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def _next(self) -> dict[str, Any]:
        try:
            message = self._messages.get(timeout=SECONDS)
        except Empty:
            raise TimeoutError(f"no word from Chromium within {SECONDS:g} s") from None
        if message is None:
            raise RuntimeError("Chromium has ended")
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(parameters["exceptionDetails"]["text"])
            case "Runtime.consoleAPICalled":
                self.complaints.append(f"console.{parameters['type']}")
            case "Log.entryAdded":
                self.complaints.append(parameters["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])

    def _read(self, descriptor: int) -> None:
        rest = b""
        while chunk := os.read(descriptor, 1 << 16):
            *messages, rest = (rest + chunk).split(b"\0")
            for message in messages:
                self._messages.put(json.loads(message))
        self._messages.put(None)


@contextmanager
def running_chromium() -> Iterator[Chromium]:
    """Start Chromium with a profile of its own and stop it afterwards."""
    need_programs({"chromium": "chromium", "bash": "bash"})
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--disable-background-networking", "--remote-debugging-pipe"]
    its_input, to_browser = os.pipe()
    from_browser, its_output = os.pipe()
    with tempfile.TemporaryDirectory(prefix="modsquad-chromium-", ignore_cleanup_errors=True) as profile:
        # The browser reads its orders at descriptor 3 and answers at 4.
        command = f'exec "$@" 3<&{its_input} 4>&{its_output}'
        process = subprocess.Popen(
            ["bash", "-c", command, "bash", "chromium", *options, f"--user-data-dir={profile}"],
            pass_fds=(its_input, its_output),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_input)
        os.close(its_output)
        try:
            yield Chromium(to_browser, from_browser)
        finally:
            process.terminate()
            process.wait(timeout=30)
            os.close(to_browser)
            os.close(from_browser)
