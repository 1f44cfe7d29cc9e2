"""A headless Chromium, driven over its own pipe: no driver, no package."""

import base64
import contextlib
import json
import os
import select
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
           "--disable-background-networking", "--remote-debugging-pipe")  # fmt: skip


class Page:
    """One tab."""

    def __init__(self, to: int, back: int):
        self._to, self._back, self._rest, self._last, self._session = to, back, b"", 0, None
        self._heard: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the DevTools protocol and waits for its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (found := self._hear()).get("id") != self._last:
            pass
        assert "error" not in found, found
        return found["result"]

    def _hear(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._back], [], [], 60)[0], "the browser says nothing"
            part = os.read(self._back, 1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        answer, self._rest = self._rest.split(b"\0", 1)
        found = json.loads(answer)
        self._heard.append(found.get("method", ""))
        return found

    def run(self, script: str) -> Any:
        """Runs the body of an asynchronous function and returns its result."""
        wish = {"expression": f"(async () => {{ {script} }})()", "awaitPromise": True, "returnByValue": True}
        found = self.call("Runtime.evaluate", **wish)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Waits until an expression is true."""
        self.run(f"""const end = Date.now() + 20000;
            while (!({condition})) {{
              if (Date.now() > end) throw new Error("never: " + {json.dumps(condition)});
              await new Promise(go => setTimeout(go, 20));
            }}""")

    def open(self, url: str) -> None:
        """Goes to an address."""
        self._heard.clear()
        self.call("Page.navigate", url=url)
        while "Page.loadEventFired" not in self._heard:
            self._hear()

    def press(self, key: str, code: int) -> None:
        """Presses a key that writes nothing, or Enter."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def size(self, width: int, height: int) -> None:
        """Sets the window's size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, path: Path) -> None:
        """Writes what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def opened(executable: str) -> Iterator[Page]:
    """Starts a browser and ends it."""
    (theirs, to), (back, out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        script = f'exec "$0" "$@" 3<&{theirs} 4>&{out}'
        process = subprocess.Popen(
            ["bash", "-c", script, executable, *OPTIONS, f"--user-data-dir={profile}"],
            pass_fds=(theirs, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(out)
        try:
            yield Page(to, back)
        finally:
            process.terminate()
            process.wait(10)
            os.close(to)
            os.close(back)
