"""Serve a model: a page to talk to it, and an API that programs know.

    python serve.py --out_dir=out/humpty_chat          prints an address; open it in a browser
    curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Who are you?"}]}'

The API is OpenAI's: /v1/models, /v1/completions and, for a chat model, /v1/chat/completions. In Python:
openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none"). Requests are answered one after another. The server
can be reached from this machine alone unless --host says otherwise; it has neither passwords nor encryption.
"""

import json
import select
import socket
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded

import sample
from humptygpt import config as configurator
from humptygpt import loading
from humptygpt.chat.api import Api, BadRequest
from humptygpt.config import UserError, check_choices
from humptygpt.decoding import choose_threads
from humptygpt.device import DTYPES

PAGE = Path(__file__).parent / "humptygpt/chat/page.html"
LARGEST = 1_000_000  # bytes of a request
PATIENCE = 20  # seconds to wait for the next bytes of a request


@dataclass(frozen=True)
class ServeConfig:
    # model
    init_from: str = "resume"  # resume: a checkpoint in out_dir; otherwise a run, a checkpoint, a model folder or gpt2
    out_dir: str = "out"  # folder of the run, or a checkpoint in it
    checkpoint: str = "best"  # best: best.pt (lowest loss); latest: ckpt.pt
    # server
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: all of this machine's
    port: int = 8000  # 0: any free one
    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # dtype of the linear layers; auto: float32 on a CPU
    quantize: str | None = None  # int8: 8-bit weights, CPU only; None: off

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        return {
            "checkpoint": ("best", "latest"),
            "dtype": ("auto", *DTYPES),
            "quantize": ("int8",),
        }

    def validate(self) -> None:
        check_choices(self)
        if self.port not in range(2**16):
            raise ValueError(f"port={self.port} must be from 0 to 65,535")


def main(argv: list[str]) -> None:
    given = configurator.read(argv, ServeConfig)
    config = configurator.make(ServeConfig, given)
    source = loading.chosen_source(config, given)
    keys = {key: getattr(config, key) for key in ("device", "dtype", "quantize")}
    loaded = sample.load(source, config.checkpoint, talks=True, **keys)
    if loaded.task == "translation":
        raise UserError(f"{source} translates; use sample.py for that")
    if loaded.device.type == "cpu" and loaded.model.has_cache:
        choose_threads(loaded.model)
    server = Server(config, Api(loaded, name_of(config, source)))
    host, port = server.server_address[:2]
    print(f"http://{host}:{port}", flush=True)
    server.serve_forever()


def name_of(config: ServeConfig, source: str | Path) -> str:
    """Name the model after its run or its source."""
    return Path(config.out_dir).name if config.init_from == "resume" else str(source)


class Server(ThreadingHTTPServer):
    """Waits for clients; each has a thread, but only one at a time uses the model."""

    daemon_threads = True

    def __init__(self, config: ServeConfig, api: Api):
        self.api = api
        self.turn = Lock()
        try:
            super().__init__((config.host, config.port), Handler)
        except OSError as error:
            raise UserError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror}; choose another --port"
            ) from error
        # a web page elsewhere must not reach this server by a name that leads to this machine
        port = self.server_address[1]
        names = (config.host, "localhost", "127.0.0.1")
        self.hosts = {f"{name}:{port}" for name in names}
        self.checks_host = config.host in names[1:]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE
    server: Server

    def do_GET(self) -> None:
        if not self.is_allowed():
            return
        if self.path == "/":
            self.send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/v1/models":
            self.send_json(200, self.server.api.models())
        else:
            self.fail(404, f"there is no {self.path}")

    def do_POST(self) -> None:
        if not self.is_allowed():
            return
        answers = {
            "/v1/chat/completions": self.server.api.chat,
            "/v1/completions": self.server.api.complete,
        }
        if self.path not in answers:
            self.fail(404, f"there is no {self.path}")
            return
        try:
            request = json.loads(self.body())
            with self.server.turn:
                if not self.has_left():
                    self.answer(request, answers[self.path](request))
        except (ValueError, RecursionError, BadRequest, UserError) as error:
            self.fail(400, str(error))
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the client has left

    def is_allowed(self) -> bool:
        """Refuse a request that a page of another origin may have made."""
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        own = not self.server.checks_host or host in self.server.hosts
        if own and origin in (None, f"http://{host}"):
            return True
        self.fail(403, "this server answers only its own page and programs")
        return False

    def body(self) -> bytes:
        size = int(self.headers.get("Content-Length") or 0)
        if not 0 < size <= LARGEST:
            raise BadRequest(f"a request has 1 to {LARGEST:,} bytes")
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError
        return body

    def has_left(self) -> bool:
        """True if the client has closed the connection."""
        ready, _, _ = select.select([self.connection], [], [], 0)
        return bool(ready) and not self.connection.recv(1, socket.MSG_PEEK)

    def answer(self, request: dict, chunks: Iterator[dict | None]) -> None:
        """Send an answer, whole or in chunks. Stop if the client leaves."""
        first = next(chunks)  # raises BadRequest before anything is sent
        if not request.get("stream"):
            while first is None:
                if self.has_left():
                    return
                first = next(chunks)
            self.send_json(200, first)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        while first is not None:
            self.event(json.dumps(first))
            first = next(chunks, None)
        self.event("[DONE]")
        self.close_connection = True

    def event(self, text: str) -> None:
        self.wfile.write(f"data: {text}\n\n".encode())

    def send_json(self, status: int, content: dict) -> None:
        self.send(status, json.dumps(content).encode(), "application/json")

    def send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fail(self, status: int, message: str) -> None:
        self.close_connection = True  # the rest of the request may be unread
        kind = "invalid_request_error"
        error = {"message": message, "type": kind, "param": None, "code": None}
        self.send_json(status, {"error": error})

    def log_message(self, text: str, *arguments: object) -> None:
        """Log no request: the terminal is for errors."""


if __name__ == "__main__":
    machine.run(main)
