"""A headless Chromium, driven by its DevTools protocol: the one that is installed, or npm's `@sparticuz/chromium`, which is
fetched once and checked against the digest that is written here."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

PACKED = ("@sparticuz/chromium", "153.0.0", "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0")
AXE = ("axe-core", "4.14.1", "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745")
_INSTALLED = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
_QUIET = (
    "--headless", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--disable-extensions", "--remote-debugging-port=0",
    "--hide-scrollbars",
)  # fmt: skip


def npm_package(name: str, version: str, sha256: str) -> tarfile.TarFile:
    """A package of the npm registry that the environment names, in memory; an OSError where it cannot be had."""
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
    with urllib.request.urlopen(f"{registry}/{name}/-/{name.rpartition('/')[2]}-{version}.tgz", timeout=120) as answer:
        content = answer.read()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f"{name} {version} is not what it was: its SHA-256 is {hashlib.sha256(content).hexdigest()}")
    return tarfile.open(fileobj=io.BytesIO(content))


def axe_source() -> str:
    with npm_package(*AXE) as package:
        member = package.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


def program(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The command of a browser and its environment. folder: where one that is fetched lies. SAE_CHROMIUM names another;
    `fetched` stands for the fetched one."""
    wanted = os.environ.get("SAE_CHROMIUM")
    if wanted != "fetched":
        found = wanted or next((path for name in _INSTALLED if (path := shutil.which(name))), None)
        if found is not None:
            return [found, "--disable-gpu"], dict(os.environ)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder / "packages"), "brotli==1.2.0"], check=True
    )
    script = "import brotli, sys; sys.stdout.buffer.write(brotli.decompress(sys.stdin.buffer.read()))"
    environment = {**os.environ, "PYTHONPATH": str(folder / "packages")}
    with npm_package(*PACKED) as package:
        for name in ("chromium", "al2023.tar", "fonts.tar", "swiftshader.tar"):
            member = package.extractfile(f"package/bin/{name}.br")
            assert member is not None
            done = subprocess.run(
                [sys.executable, "-c", script], input=member.read(), stdout=subprocess.PIPE, env=environment, check=True
            )
            if name == "chromium":
                (folder / name).write_bytes(done.stdout)
                (folder / name).chmod(0o755)
            else:
                with tarfile.open(fileobj=io.BytesIO(done.stdout)) as content:
                    content.extractall(folder, filter="data")
    # The package's own list of fonts names another folder, and a page without a font ends the browser.
    fonts, cache = folder / "fonts", folder / "font-cache"
    settings = f"<fontconfig><dir>{fonts}</dir><cachedir>{cache}</cachedir></fontconfig>"
    (folder / "own-fonts.conf").write_text(settings)
    libraries = {"LD_LIBRARY_PATH": str(folder / "lib"), "FONTCONFIG_FILE": str(folder / "own-fonts.conf")}
    return [str(folder / "chromium"), "--disable-gpu"], {**os.environ, **libraries}


class Page:
    """A tab. Every request, console message and error of it is noted."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._number = socket, 0
        self.requests: list[str] = []
        self.said: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=120))
            self._note(message)
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        about = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])
            case "Runtime.exceptionThrown":
                self.said.append(str(about["exceptionDetails"]))
            case "Runtime.consoleAPICalled" | "Log.entryAdded":
                self.said.append(str(about))

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, (script, found["exceptionDetails"])
        return found["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def wait(self, script: str, seconds: float = 60) -> Any:
        """Until the expression is true."""
        deadline = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < deadline, (script, self.run("document.body.innerText.slice(0, 2000)"), self.said)
            time.sleep(0.02)
        return found

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def drag(self, start: tuple[float, float], stop: tuple[float, float]) -> None:
        self.hover(*start)
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", stop), ("mouseReleased", stop)):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def place(self, script: str) -> tuple[float, float]:
        """The middle of the element that an expression gives, scrolled into view; looked for again where the page was drawn
        anew in the meantime."""
        frame = "await new Promise(requestAnimationFrame)"
        look = f"const e = {script}; e.scrollIntoView({{block: 'center'}}); {frame}; {frame}; r = e.getClientRects()[0]"
        middle = "return [r.x + r.width / 2, r.y + r.height / 2]"
        x, y = self.run(f"(async () => {{ let r; do {{ {look} }} while (!r); {middle}; }})()")
        return x, y

    def shape(self, width: int, height: int, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browsing() -> Iterator[Page]:
    """One page of a browser of its own, which is ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="sae-chromium-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        command, environment = program(folder)
        profile = folder / "profile"
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [*command, *_QUIET, f"--user-data-dir={profile}", "about:blank"], env=environment, stdout=log, stderr=log
            )
        try:
            port = _port(process, profile, folder / "log")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=60) as answer:
                tab = next(one for one in json.load(answer) if one["type"] == "page")
            with connect(tab["webSocketDebuggerUrl"], max_size=None, open_timeout=60, proxy=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _port(process: subprocess.Popen, profile: Path, log: Path) -> int:
    for _ in range(1_200):
        found = (profile / "DevToolsActivePort").read_text().split() if (profile / "DevToolsActivePort").exists() else []
        if found:
            return int(found[0])
        assert process.poll() is None, log.read_text()[-3_000:]
        time.sleep(0.05)
    raise TimeoutError(log.read_text()[-3_000:])
