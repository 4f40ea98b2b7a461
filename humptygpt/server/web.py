"""The addresses of a server: the page at /, /health, and OpenAI's API under /v1, with Starlette on uvicorn."""

import asyncio
import hmac
import json
import logging
import re
import traceback
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from humptygpt.cli import UserError, first_line
from humptygpt.server.api import Api

LARGEST = 1_000_000  # bytes of a request
# A website can point its own name at this machine, and a browser then lets its page read our answers. So requests must
# name the server by an IP address, as localhost, or by a name that the user gave. A browser always sends a name.
HOST = re.compile(r"(localhost|[0-9.]+|\[[0-9a-f:]+\])?")


class Web:
    """A web application that answers with one model.

    One thread computes the next part of one answer after another, so the answers to several clients take turns.

    page: what is at /. names: other names of this machine, in lower case, that requests may use. key: what clients must
    send, if not None.
    """

    def __init__(self, api: Api, page: bytes, names: Collection[str], key: str | None):
        self.api, self.page, self.names, self.key = api, page, names, key
        # Python waits for this thread, too, before it ends; it would abort if a thread were still inside torch
        self.computing = ThreadPoolExecutor(max_workers=1)
        self.app = Starlette(
            routes=[
                Route("/", self.show_page),
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/v1/completions", partial(self.answer, api.complete), methods=["POST"]),
                Route("/v1/chat/completions", partial(self.answer, api.chat), methods=["POST"]),
            ],
            exception_handlers={HTTPException: self.refuse},  # an unknown address or method
        )

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        respond = self.check(Request(scope)) or self.app
        await respond(scope, receive, send)

    def check(self, request: Request) -> Response | None:
        """Return an error for a request that a page of another site may have made, and for one without the key."""
        headers, path = request.headers, request.scope["path"]
        host, origin = (headers.get(name, "").lower() for name in ("host", "origin"))
        name = re.sub(r":\d+$", "", host)
        if not HOST.fullmatch(name) and name not in self.names:
            message = f"this server does not know the name {name}: --allowed_hosts={name}"
            return JSONResponse(describe(message), 403)
        if origin and origin.partition("://")[2] != host:
            return JSONResponse(describe(f"pages of {origin} may not ask"), 403)
        sent = headers.get("authorization", "").removeprefix("Bearer ").strip()
        key = sent if self.key is None or path in ("/", "/health") else self.key
        if not hmac.compare_digest(sent.encode(), key.encode()):
            message = "the API key is missing or wrong"
            return JSONResponse(describe(message, code="invalid_api_key"), 401)

    async def refuse(self, request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.scope['path']}: {error.detail}"
        return JSONResponse(describe(message), error.status_code)

    async def show_page(self, _: Request) -> Response:
        return HTMLResponse(self.page)

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.api.model_entry()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self.api.name:
            raise HTTPException(404)
        return JSONResponse(self.api.model_entry())

    async def answer(self, method: Callable[[bytes], Iterator[str]], request: Request) -> Response:
        """Answer with one of the API's methods."""
        try:
            parts = method(await read_body(request))
            first = await self.next_part(parts)
        except Exception as error:
            return JSONResponse(explain(error), 400 if is_clients(error) else 500)
        kind = "text/event-stream" if first.startswith("data:") else "application/json"
        return StreamingResponse(self.send_parts(first, parts), media_type=kind)

    async def send_parts(self, part: str | None, parts: Iterator[str]) -> AsyncIterator[str]:
        """Yield a part of an answer and those after it. After an error, the last part describes it."""
        form = "data: {}\n\n" if part.startswith("data:") else "{}"
        try:
            while part is not None:
                yield part
                part = await self.next_part(parts)
        except Exception as error:
            yield form.format(json.dumps(explain(error)))
        finally:
            self.computing.submit(parts.close)  # also if the client has left: it frees the cache

    async def next_part(self, parts: Iterator[str]) -> str | None:
        """Compute the next part of an answer in its turn. None: the answer is complete."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.computing, next, parts, None)


async def read_body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():  # to its end: before, few clients read an error
        body += chunk[: LARGEST + 1 - len(body)]
    if len(body) > LARGEST:
        raise UserError(f"a request may have at most {LARGEST:,} bytes")
    return body


def is_clients(error: Exception) -> bool:
    """Whether the request was wrong, or its client has left before its end."""
    return isinstance(error, UserError | ValueError | ClientDisconnect)


def explain(error: Exception) -> dict:
    """Describe an error of a request. The traceback of another error is printed."""
    if is_clients(error):
        return describe(str(error), code=getattr(error, "code", None))
    traceback.print_exception(error)
    return describe(f"{type(error).__name__}: {first_line(error)}", "server_error")


def describe(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict:
    """Return an error in OpenAI's form. code: a word for programs."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Server(uvicorn.Server):
    """Runs a web application until Ctrl-C, which ends at once, whatever is being answered."""

    def __init__(self, app: Web):
        # each of these off or plain: of uvicorn's choices, which depend on what is installed
        config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", timeout_graceful_shutdown=0)
        super().__init__(config)
        logging.getLogger("uvicorn.error").setLevel("ERROR")  # not the news that it starts

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        logging.disable()  # uvicorn would show a traceback for each answer that it ends
        super().handle_exit(sig, frame)
