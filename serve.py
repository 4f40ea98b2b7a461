"""Serve a model: a page to talk to it, and an API that programs know.

    python serve.py --out_dir=out/humpty_chat     prints an address; open it in a browser
    curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Who are you?"}]}'

The API is OpenAI's: /v1/models, /v1/completions and, for a chat model, /v1/chat/completions. In Python:
openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none"). Answers to several clients take turns. Only
programs on this machine can reach the server, unless --host says otherwise. It has no passwords and no encryption.
"""

import json
import re
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded

from humptygpt import cli
from humptygpt.chat.api import Api
from humptygpt.cli import UserError, check_choices, first_line, refuse_vain
from humptygpt.fast.generation import choose_threads
from humptygpt.loading import CHOICES, chosen_source, pipeline

PAGE = Path(__file__).parent / "humptygpt/chat/page.html"
JSON = "application/json"
LARGEST = 1_000_000  # bytes of a request
# A website can point its own name at this machine, and a browser then lets its page read our answers. So requests must
# name the server by an IP address or as localhost.
HOST = re.compile(r"(localhost|[0-9.]+|\[[0-9a-f:]+\])(:\d+)?")


@dataclass(frozen=True)
class ServeConfig:
    # model
    init_from: str = "resume"  # resume: a checkpoint in out_dir; otherwise a run, a checkpoint, a model folder or gpt2
    out_dir: str = "out"  # folder of the run, or a checkpoint in it
    checkpoint: str = "best"  # best: best.pt (lowest loss); latest: ckpt.pt
    # server
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: all addresses of this machine
    port: int = 8000  # 0: any free port
    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # dtype of the linear layers; auto: float32 on a CPU
    quantize: str | None = None  # int8: 8-bit weights, CPU only; None: off

    validate = check_choices

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        return CHOICES


def main(argv: list[str]) -> None:
    given = cli.read(argv, ServeConfig)
    config = cli.make(ServeConfig, given)
    refuse_vain(given, vars(config), {"dtype": ("quantize", ("int8",))})
    source = chosen_source(config, given)
    loaded = pipeline(
        source,
        config.checkpoint,
        talks=True,
        device=config.device,
        dtype=config.dtype,
        quantize=config.quantize,
    )
    if loaded.task == "translation":
        raise UserError(f"{source} translates; use sample.py for that")
    choose_threads(loaded)
    server = listen(config.host, config.port, Api(loaded, str(source)))
    print(f"open http://{config.host}:{server.server_port} (Ctrl-C stops)", flush=True)
    server.serve_forever()


class Server(ThreadingHTTPServer):
    """Waits for clients. Each has a thread that sends its answer. One more thread generates all answers in turn.

    It never waits for a client, but queues the parts of an answer, which are a few thousand at most.
    """

    request_queue_size = 128  # clients that may wait until they are accepted

    def __init__(self, host: str, port: int, api: Api):
        super().__init__((host, port), Handler)
        self.api = api
        # answers: (generator, queue of its parts, Event that is set when the client has left)
        self.unfinished = SimpleQueue()
        Thread(target=self.generate, daemon=True).start()

    def generate(self) -> None:
        """Compute the next part of each answer in turn. Its last part is None, or the exception that ended it."""
        while True:
            answer, parts, left = self.unfinished.get()
            if left.is_set():
                continue
            try:
                part = next(answer, None)
            except Exception as error:
                part = error
            parts.put(part)
            if isinstance(part, str):
                self.unfinished.put((answer, parts, left))


def listen(host: str, port: int, api: Api) -> Server:
    try:
        return Server(host, port, api)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}, port {port}: {error}") from error


class Handler(BaseHTTPRequestHandler):
    """Answers one request. It speaks HTTP/1.0, which ends each answer by closing the connection."""

    timeout = 20  # seconds to wait for the client's next bytes
    disable_nagle_algorithm = True  # send each token at once
    server: Server

    def handle(self) -> None:
        with suppress(ConnectionError, TimeoutError):  # the client has left
            super().handle()

    def parse_request(self) -> bool:
        """Read the headers. Refuse a request that a page of another site may have made."""
        if not super().parse_request():
            return False
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if HOST.fullmatch(host) and origin in (None, f"http://{host}"):
            return True
        self.send_error(403, "open this server by its address, not from another page")
        return False

    def do_GET(self) -> None:
        api = self.server.api
        match self.path:
            case "/":
                self.send(200, "text/html", PAGE.read_bytes())
            case "/v1/models":
                self.send(200, JSON, json.dumps(api.models()).encode())
            case "/v1/chat/completions":
                self.answer(api.chat)
            case "/v1/completions":
                self.answer(api.complete)
            case _:
                self.send_error(404, f"there is no {self.path}")

    do_POST = do_GET

    def answer(self, method: Callable[[bytes], Iterator[str]]) -> None:
        """Send the answer of one of the API's methods, part by part."""
        kind = None
        parts, left = SimpleQueue(), Event()
        try:
            answer = method(self.read_body())
            self.server.unfinished.put((answer, parts, left))
            while (part := parts.get()) is not None:
                if isinstance(part, Exception):
                    raise part
                if kind is None:
                    kind = "text/event-stream" if part.startswith("data:") else JSON
                    self.send(200, kind)
                self.wfile.write(part.encode())
        except OSError:  # the client has left, or reads nothing
            raise
        except Exception as error:
            status, message = 400, str(error)
            if not isinstance(error, UserError | ValueError):
                traceback.print_exc()
                status, message = 500, f"{type(error).__name__}: {first_line(error)}"
            if kind is None:
                self.send_error(status, message)
            else:
                content = error_of(status, message)
                self.wfile.write(content if kind == JSON else b"data: %s\n\n" % content)
        finally:
            left.set()

    def read_body(self) -> bytes:
        size = int(self.headers.get("Content-Length", 0))
        if 0 < size <= LARGEST:
            return self.rfile.read(size)
        while size > 0 and self.rfile.read(min(size, LARGEST)):
            size -= LARGEST  # a client reads the error once it has sent everything
        raise UserError(f"Content-Length must be from 1 to {LARGEST:,}")

    def send(self, status: int, kind: str, content: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(content)

    def send_error(self, status: int, message: str = "", *_: object) -> None:
        """Send an error in OpenAI's form. The base class calls this, too."""
        self.send(status, JSON, error_of(status, message or self.responses[status][0]))


def error_of(status: int, message: str) -> bytes:
    """Describe an error as OpenAI's API does."""
    kind = "server_error" if status == 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return json.dumps({"error": error}).encode()


if __name__ == "__main__":
    machine.run(main)
