"""A server on this machine that plays a public one: it sends files whole, from an offset on, cut short, or not."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        here, asked = self.server, self.headers.get("Range")
        here.asked.append((self.path, asked, self.headers.get("Authorization")))
        found = here.answer(self.path)
        if isinstance(found, int):
            return self.send_headers(found, {"Content-Length": "0"})
        if isinstance(found, str):
            return self.send_headers(302, {"Location": found, "Content-Length": "0"})
        begin = int(asked.removeprefix("bytes=")[:-1]) if asked and here.has_ranges else 0
        if begin and begin == len(found):
            return self.send_headers(416, {"Content-Range": f"bytes */{len(found)}"})
        self.send_headers(
            206 if begin else 200, {"Content-Length": str(len(found) - begin)}
        )
        cuts = here.cuts.get(self.path.rpartition("/")[2], [])
        if self.command == "GET":
            self.wfile.write(found[begin : begin + (cuts.pop(0) if cuts else len(found))])

    do_HEAD = do_GET

    def send_headers(self, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in (headers | self.server.headers).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass


@contextmanager
def serving(answer: Callable[[str], bytes | int | str]) -> Iterator[ThreadingHTTPServer]:
    """answer: path -> the file's content, the code of a failure, or the address that it redirects to.

    cuts of the server: {file: the bytes after which its answers end}, once each; has_ranges: whether it can begin at an
    offset; asked: (path, Range, Authorization) of each request; headers: of each answer, beside its own.
    """
    here = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here.answer, here.cuts, here.has_ranges, here.asked = answer, {}, True, []
    here.headers = {}
    thread = threading.Thread(target=here.serve_forever)
    thread.start()
    try:
        yield here
    finally:
        here.shutdown()
        thread.join()
        here.server_close()
