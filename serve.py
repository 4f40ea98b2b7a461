"""Serve a model: a page to talk to it, and an API that programs know.

    python serve.py --out_dir=out/humpty_chat     prints an address; open it in a browser
    curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Who are you?"}]}'

The API is OpenAI's: /v1/models, /v1/completions and, for a chat model, /v1/chat/completions. In Python:
openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none"). Answers to several clients take turns. Only
programs on this machine can reach the server, unless --host says otherwise; then clients need the key in the
environment variable HUMPTYGPT_API_KEY, or in a file: --api_key=FILE:key.txt. There is no encryption: put a proxy in
front of it. When training has replaced the run, the server opens the new one.
"""

import hmac
import json
import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded

from humptygpt import cli
from humptygpt.cli import TEXTS, UserError, check_effects, first_line, note
from humptygpt.files import refuse_unwritable
from humptygpt.formats.load import find_source
from humptygpt.generation.generator import (
    IN_VAIN,
    PipelineConfig,
    choose_threads,
    chosen_source,
)
from humptygpt.generation.sampling import read_start
from humptygpt.page.html import fill
from humptygpt.server.api import Api

JSON = "application/json"
LARGEST = 1_000_000  # bytes of a request
# seconds in which a request must arrive, and for which a client may leave its answer unread
PATIENCE = 20
CONNECTIONS = 200  # open at once; the system lets further clients wait
# A website can point its own name at this machine, and a browser then lets its page read our answers. So requests must
# name the server by an IP address, as localhost, or by a name that the user gave. A browser always sends a name.
HOST = re.compile(r"(localhost|[0-9.]+|\[[0-9a-f:]+\])?")


@dataclass(frozen=True)
class ServeConfig(PipelineConfig):
    # server
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: all addresses of this machine
    port: int = 8000  # 0: any free port
    api_key: str | None = None  # FILE:path of the key that clients must send; none: no key
    allowed_hosts: TEXTS = ()  # other names of this machine, as behind a proxy: box.local
    log: str | None = None  # file to which questions and answers are added, as JSON lines
    # chat
    forget: bool = False  # leave out the oldest turns of a conversation that is too long

    def validate(self) -> None:
        super().validate()
        key = self.key
        # no other machine can reach these
        local = self.host in ("127.0.0.1", "::1", "localhost")
        if not (key or local or self.api_key == "none"):
            raise ValueError(
                f"host={self.host} lets other machines in; set HUMPTYGPT_API_KEY or --api_key=FILE:path, or"
                " --api_key=none to let anybody ask"
            )
        if key is not None and not re.fullmatch("[!-~]+", key):
            raise ValueError(
                "the API key must be ASCII without spaces, or no client can send it"
            )

    @cached_property  # a pipe can be read only once
    def key(self) -> str | None:
        """Return the key that clients must send, or None. Raises UserError if its file cannot be read."""
        if self.api_key is None:
            return os.environ.get("HUMPTYGPT_API_KEY")
        if self.api_key == "none":
            return None
        if not self.api_key.startswith("FILE:"):
            raise ValueError(
                "api_key must be FILE:path or none, since everybody on this machine can see a command; or set"
                " HUMPTYGPT_API_KEY"
            )
        return read_start(self.api_key).strip()


def main(argv: list[str]) -> None:
    given = cli.read(argv, ServeConfig)
    config = cli.make(ServeConfig, given)
    check_effects(given, vars(config), IN_VAIN)
    source = chosen_source(config, given)
    if config.log:
        with refuse_unwritable(Path(config.log)):
            Path(config.log).open("a").close()
        print(f"questions and answers are written to {config.log}")
    path = find_source(source, config.checkpoint)
    name = path.absolute().parent.name if path.suffix == ".pt" else str(source)
    with listen(config, partial(open_model, config, path, name), path) as server:
        key = "/#KEY, with your key in place of KEY" if server.key else ""
        address = f"http://{config.host}:{server.server_port}{key}"
        print(f"open {address} (Ctrl-C stops)", flush=True)
        server.serve_forever()


def open_model(config: ServeConfig, path: Path, name: str) -> Api:
    loaded = config.pipeline(path)
    if loaded.task == "translation":
        raise UserError(f"{path} translates; use sample.py for that")
    choose_threads(loaded)
    return Api(loaded, name, config.forget, config.log)


class Server(ThreadingHTTPServer):
    """Waits for clients. Each has a thread that sends its answer. One more thread computes the parts of all answers.

    A client asks for the next part when it has got the one before, so answers take turns, and a slow client delays
    only its own. path: the checkpoint that open_api() opens, which it does again when a new run has replaced it.
    """

    allow_reuse_address = not machine.ON_WINDOWS  # there, two servers could share a port
    daemon_threads = False  # server_close() waits for them
    request_queue_size = 128  # clients that may wait until they are accepted

    def __init__(self, config: ServeConfig, open_api: Callable[[], Api], path: Path | None):
        self.open_api, self.path = open_api, path
        self.opened = self.changed()
        self.api = open_api()
        self.hosts = {name.lower() for name in (config.host, *config.allowed_hosts)}
        self.key = config.key
        # Python waits for this thread, too, before it ends; it would abort if a thread were still inside torch
        self.computing = ThreadPoolExecutor(max_workers=1)
        self.connections = {}  # {open connection: time by which its request must have arrived}
        self.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        super().__init__((config.host, config.port), Handler)

    def get_request(self) -> tuple[socket.socket, tuple]:
        """Accept a connection. If there are too many, or no descriptors are left, wait a moment and raise OSError."""
        if len(self.connections) < CONNECTIONS:
            with suppress(OSError):
                connection, address = super().get_request()
                self.connections[connection] = time.monotonic() + PATIENCE
                return connection, address
        time.sleep(0.1)
        raise OSError

    def changed(self) -> int:
        """Return when the checkpoint was written; 0: there is none."""
        with suppress(OSError):
            if self.path and self.path.suffix == ".pt":
                return self.path.stat().st_mtime_ns
        return 0

    def reopen(self) -> None:
        """Open a checkpoint that was replaced, unless its run is still training. Begun answers keep their model."""
        try:
            metrics = self.path.parent / "metrics.jsonl"
            last = metrics.read_bytes().splitlines()[-1:] if metrics.exists() else []
            if any(b'"end": ' not in line for line in last):
                return
            self.opened = self.changed()
            self.api = self.open_api()
        except Exception as error:  # of a damaged file, or in an edited model.py
            note(f"still serving the earlier model: {first_line(error)}")

    def service_actions(self) -> None:
        """End the request of each client that has taken too long to send it. Open a new model."""
        if self.changed() not in (0, self.opened):
            self.reopen()
        for connection, end in [*self.connections.items()]:
            if end < time.monotonic():
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)

    def server_close(self) -> None:
        """End all answers, and wait for the threads that send them, because these may free tensors."""
        for connection in [*self.connections]:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def shutdown_request(self, request: socket.socket) -> None:
        super().shutdown_request(request)
        self.connections.pop(request, None)  # Ctrl-C may end it a second time

    def next_part(self, answer: Iterator[str]) -> str | None:
        """Compute the next part of an answer in its turn. None: the answer is complete."""
        try:
            part = self.computing.submit(next, answer, None)
        except RuntimeError as error:
            raise ConnectionError("the server ends") from error
        return part.result()


def listen(
    config: ServeConfig, open_api: Callable[[], Api], path: Path | None = None
) -> Server:
    try:
        return Server(config, open_api, path)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen on {config.host}, port {config.port}: {error}"
        ) from error


class Handler(BaseHTTPRequestHandler):
    """Answers one request. It speaks HTTP/1.0, which ends each answer by closing the connection."""

    timeout = PATIENCE
    disable_nagle_algorithm = True  # send each token at once
    kind: str | None = None  # Content-Type of the answer, once it has begun
    server: Server

    def handle(self) -> None:
        with suppress(ConnectionError, TimeoutError):  # the client has left
            super().handle()

    def parse_request(self) -> bool:
        """Read the headers. Refuse a request that a page of another site may have made, and one without the key."""
        try:
            return super().parse_request() and self.may_ask()
        except ValueError as error:
            self.send_error(400, f"the address or the Origin is not valid: {error}")
            return False

    def may_ask(self) -> bool:
        """Send an error and return False if the request is refused. Raises ValueError if it has an invalid URL."""
        host, origin = (self.headers.get(name, "").lower() for name in ("Host", "Origin"))
        name = re.sub(r":\d+$", "", host)
        if not HOST.fullmatch(name) and name not in self.server.hosts:
            self.send_error(
                403, f"this server does not know the name {name}: --allowed_hosts={name}"
            )
            return False
        if origin and urlsplit(origin).netloc != host:
            self.send_error(403, f"pages of {origin} may not ask")
            return False
        is_open = urlsplit(self.path).path in ("/", "/health")
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        key = self.server.key or sent
        if not is_open and not hmac.compare_digest(sent.encode(), key.encode()):
            self.send_error(401, "the API key is missing or wrong", code="invalid_api_key")
            return False
        return True

    def do_GET(self) -> None:
        api = self.server.api
        match urlsplit(self.path).path:
            case "/":
                self.send(200, "text/html", fill("chat.html"))
            case "/health":
                self.send_json({"status": "ok"})
            case "/v1/models":
                self.send_json({"object": "list", "data": [api.model_entry()]})
            case path if unquote(path) == f"/v1/models/{api.name}":
                self.send_json(api.model_entry())
            case "/v1/chat/completions":
                self.answer(api.chat)
            case "/v1/completions":
                self.answer(api.complete)
            case path:
                self.send_error(404, f"there is no {path}")

    do_POST = do_HEAD = do_GET

    def answer(self, method: Callable[[bytes], Iterator[str]]) -> None:
        """Send the answer of one of the API's methods, part by part."""
        try:
            answer = method(self.read_body())
            while part := self.server.next_part(answer):
                if self.kind is None:
                    self.kind = "text/event-stream" if part.startswith("data:") else JSON
                    self.send(200, self.kind)
                self.wfile.write(part.encode())
        except OSError:  # the client has left or reads nothing, or the server ends
            raise
        except Exception as error:
            status, message = 400, str(error)
            if not isinstance(error, UserError | ValueError):
                traceback.print_exc()
                status, message = 500, f"{type(error).__name__}: {first_line(error)}"
            self.send_error(status, message, code=getattr(error, "code", None))

    def read_body(self) -> bytes:
        size = int(self.headers.get("Content-Length", 0))
        if 0 < size <= LARGEST:
            return self.rfile.read(size)
        while size > 0 and self.rfile.read(min(size, LARGEST)):
            size -= LARGEST  # a client reads the error once it has sent everything
        raise UserError(
            f"Content-Length must be from 1 to {LARGEST:,}; chunked bodies are not supported"
        )

    def send(self, status: int, kind: str, content: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, content: dict) -> None:
        self.send(200, JSON, json.dumps(content).encode())

    def send_error(
        self, status: int, message: str = "", _: str = "", code: str | None = None
    ) -> None:
        """Send an error in OpenAI's form. The base class calls this, too. code: a word for programs."""
        error = {
            "message": message or self.responses[status][0],
            "type": "server_error" if status == 500 else "invalid_request_error",
            "param": None,
            "code": code,
        }
        content = json.dumps({"error": error}).encode()
        if self.kind is None:
            self.send(status, JSON, content)
        else:  # the answer has begun
            self.wfile.write(content if self.kind == JSON else b"data: %s\n\n" % content)


if __name__ == "__main__":
    machine.run(main)
