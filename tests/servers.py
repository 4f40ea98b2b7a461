"""A server on this machine that plays a public one: it sends files whole, cut short, or not."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        here = self.server
        here.asked.append(self.path)
        answer = here.answer(self.path)
        if isinstance(answer, int):
            return self.send_headers(answer, {"Content-Length": "0"})
        self.send_headers(200, {"Content-Length": str(len(answer))})
        cuts = here.cuts.get(self.path.rpartition("/")[2])
        if self.command == "GET":
            self.wfile.write(answer[: cuts.pop() if cuts else None])

    do_HEAD = do_GET

    def send_headers(self, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in (headers | self.server.headers).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass


@contextmanager
def serving(answer: Callable[[str], bytes | int]) -> Iterator[ThreadingHTTPServer]:
    """answer: path -> the file's content, or the code of a failure.

    cuts of the server: {file: the bytes after which its answers end}, once each; asked: the path of each request;
    headers: of each answer, beside its own.
    """
    here = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here.answer, here.cuts, here.asked = answer, {}, []
    here.headers = {}
    thread = threading.Thread(target=here.serve_forever, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        here.shutdown()
        thread.join(30)
        here.server_close()
