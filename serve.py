"""Serve a model: a page to talk to it, and an API that programs know.

    python serve.py --out_dir=out/humpty_chat     prints an address; open it in a browser
    curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Who are you?"}]}'

The API is OpenAI's: /v1/models, /v1/completions and, for a chat model, /v1/chat/completions. In Python:
openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none"). Answers to several clients take turns. Only
programs on this machine can reach the server, unless --host says otherwise; then clients need the key in the
environment variable HUMPTYGPT_API_KEY, or in a file: --api_key=FILE:key.txt. There is no encryption: put a proxy in
front of it.
"""

import os
import re
import socket
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded

from humptygpt import cli
from humptygpt.cli import TEXTS, UserError, check_effects
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


@dataclass(frozen=True)
class ServeConfig(PipelineConfig):
    # server
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: all addresses of this machine
    port: int = 8000  # 0: any free port
    api_key: str | None = None  # FILE:path of the key that clients must send; none: no key
    allowed_hosts: TEXTS = ()  # other names of this machine, as behind a proxy: box.local
    log: str | None = None  # file to which questions and answers are added, as JSON lines

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
            raise ValueError("the API key must be ASCII without spaces, or no client can send it")

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
    from humptygpt.server import web  # it needs packages that --help does not

    given = cli.read(argv, ServeConfig)
    config = cli.make(ServeConfig, given)
    check_effects(given, cli.typed_keys(argv), vars(config), IN_VAIN)
    source = chosen_source(config, given)
    if config.log:
        with refuse_unwritable(Path(config.log)):
            Path(config.log).open("a").close()
        print(f"questions and answers are written to {config.log}")
    path = find_source(source, config.checkpoint)
    name = path.absolute().parent.name if path.suffix == ".pt" else str(source)
    with listen(config) as listener:
        names = {name.lower() for name in (config.host, *config.allowed_hosts)}
        app = web.Web(open_model(config, path, name), fill("chat.html"), names, config.key)
        key = "/#KEY, with your key in place of KEY" if config.key else ""
        port = listener.getsockname()[1]
        print(f"open http://{config.host}:{port}{key} (Ctrl-C stops)", flush=True)
        web.Server(app).run(sockets=[listener])


def open_model(config: ServeConfig, path: Path, name: str) -> Api:
    loaded = config.pipeline(path)
    if loaded.task == "translation":
        raise UserError(f"{path} translates; use sample.py for that")
    choose_threads(loaded)
    return Api(loaded, name, config.log)


def listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {config.host}, port {config.port}: {error}") from error


if __name__ == "__main__":
    machine.run(main)
