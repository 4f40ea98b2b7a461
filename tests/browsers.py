"""Firefox and WebKit, driven by the W3C's commands: a page and its scripts, and no more.

Debian: apt-get install firefox-esr; apt-get install webkit2gtk-driver xvfb.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

WAIT = 60  # seconds until a browser must have started or ended
ANSWER = 110  # seconds until a command must have ended; a script has 100


class BrowserDied(Exception):
    """A browser does not answer any more, which says nothing about the page: the test is tried once more."""


class Browser:
    """A browser that is driven by send(command, **parameters), with the W3C's names of commands."""

    has_died = False

    def died(self) -> BrowserDied:
        self.has_died = True
        return BrowserDied(f"{type(self).__name__} has died")

    def open(self, url: str) -> None:
        self.send("Navigate", url=url)

    def run(self, script: str, *args):
        """Run a script, which may use await, in the page. Returns what it returns."""
        body = f"const done = arguments[arguments.length - 1]; (async () => {{ {script} }})()"
        waiting = f"{body}.then(done, (error) => done(`error: ${{error}}`));"
        answer = self.send("ExecuteAsyncScript", script=waiting, args=list(args))
        assert not f"{answer}".startswith("error: "), answer
        return answer

    def press(self, *keys: str) -> None:
        """Press keys, one after another, each as the character that WebDriver has for it."""
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.send("PerformActions", actions=[{"type": "key", "id": "keys", "actions": steps}])


class Firefox(Browser):
    """Over its own protocol, Marionette: lists of JSON, each after its length."""

    def __init__(self, folder: Path):
        port = free_port()
        (folder / "user.js").write_text(f'user_pref("marionette.port", {port});\n')
        command = ["firefox-esr", "--headless", "--marionette", "--profile", f"{folder}"]
        self.process = start(command)
        self.stream = connect(port).makefile("rwb")
        self.receive()
        self.count = itertools.count()
        self.send("NewSession")
        self.send("SetTimeouts", script=100_000)

    def send(self, command: str, **parameters):
        message = json.dumps([0, next(self.count), f"WebDriver:{command}", parameters])
        try:
            self.stream.write(f"{len(message.encode())}:{message}".encode())
            self.stream.flush()
            _, _, error, result = self.receive()
        except OSError as error:
            raise self.died() from error
        assert error is None, error
        return (result or {}).get("value")

    def receive(self):
        length = b""
        while (byte := self.stream.read(1)) != b":":
            if not byte:
                raise ConnectionError("the connection has ended")
            length += byte
        return json.loads(self.stream.read(int(length)))

    def close(self) -> None:
        self.process.kill()
        self.process.wait(WAIT)


class WebKit(Browser):
    """WebKitGTK's MiniBrowser, which stands for Safari, over HTTP."""

    def __init__(self, folder: Path):
        port = free_port()
        screen = ["xvfb-run", "-a", "-s", "-screen 0 1440x900x24"]
        home = {"HOME": f"{folder}", "XDG_RUNTIME_DIR": f"{folder}"}
        self.process = start([*screen, "WebKitWebDriver", f"--port={port}"], **home)
        connect(port).close()
        self.session = f"http://127.0.0.1:{port}/session"
        capabilities = {"alwaysMatch": {"webkitgtk:browserOptions": {"args": ["--automation"]}}}
        self.session += f"/{self.post('', capabilities=capabilities)['sessionId']}"
        self.send("SetTimeouts", script=100_000)

    def send(self, command: str, **parameters):
        return self.post(f"/{PATHS[command]}", **parameters)

    def post(self, path: str, **parameters):
        sent = json.dumps(parameters).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.session + path, *sent)
        try:
            with urllib.request.urlopen(request, timeout=ANSWER) as answer:
                return json.load(answer)["value"]
        except OSError as error:
            raise self.died() from error

    def close(self) -> None:
        request = urllib.request.Request(self.session, method="DELETE")
        with contextlib.suppress(OSError):  # if it has died
            urllib.request.urlopen(request, timeout=WAIT).close()
        os.killpg(self.process.pid, signal.SIGTERM)  # the screen, too
        self.process.wait(WAIT)


PATHS = {
    "Navigate": "url",
    "ExecuteAsyncScript": "execute/async",
    "PerformActions": "actions",
    "SetTimeouts": "timeouts",
}
BROWSERS = {
    Firefox: ["firefox-esr"],
    WebKit: ["WebKitWebDriver", "xvfb-run"],
}


def start_browser(kind: type[Browser], folder: Path) -> Browser:
    """Start a browser with a profile in this folder. Skips the test where it is not installed."""
    for program in BROWSERS[kind]:
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    return kind(folder)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(command: list[str], **environment: str) -> subprocess.Popen:
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    own = {"start_new_session": True, "env": {**os.environ, **environment}}
    return subprocess.Popen(command, **own, **silent)


def connect(port: int) -> socket.socket:
    """Connect to a browser as soon as it listens."""
    end = time.monotonic() + WAIT
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=ANSWER)
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise BrowserDied("the browser did not start") from None
            time.sleep(0.1)
