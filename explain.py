"""Make an HTML page from a run. Its model runs in the page and shows every step of its computation as you type.

    python explain.py --out_dir=out/shakespeare_char
    python explain.py --out_dir=out/shakespeare_char --start="ROMEO: What light through yon" --to=page.html
    python explain.py --playground=playground.html     a page that trains a GPT, without a run

The page is one file: it opens from disk in any browser, without a network, and can be sent by email. It holds the
model's weights, rounded to 16 bits, the weights of the run's snapshots in 8 bits, the tokenizer and the losses.
"""

import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from humptygpt import cli, machine
from humptygpt.cli import check_choices, refuse_vain
from humptygpt.files import write_whole

# torch takes seconds to import. main() imports it last, so that a misspelt key is reported at once.

SOURCES = Path(__file__).parent / "explain"


@dataclass(frozen=True)
class ExplainConfig:
    # explain
    out_dir: str = "out"  # folder of the run, or a checkpoint in it
    checkpoint: str = "best"  # best: best.pt (lowest loss); latest: ckpt.pt
    to: str | None = None  # HTML file to write; None: explain.html beside the checkpoint
    start: str | None = None  # text that the page shows first
    snapshots: bool = True  # include the weights of earlier steps in the page
    playground: str | None = (
        None  # HTML file to write, without a run: a page that trains a new GPT
    )

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        return {"checkpoint": ("best", "latest")}

    def validate(self) -> None:
        check_choices(self)


def main(argv: list[str]) -> None:
    given = cli.read(argv, ExplainConfig)
    config = cli.make(ExplainConfig, given)
    others = given.keys() - {"playground"}
    if config.playground:
        refuse_vain(
            given, vars(config), dict.fromkeys(others, ("playground", (config.playground,)))
        )
    from humptygpt.checkpoint import find_checkpoint
    from humptygpt.page.page_data import page_data, playground_data

    if config.playground:
        path, data = Path(config.playground), playground_data()
    else:
        checkpoint = find_checkpoint(Path(config.out_dir), config.checkpoint)
        path = Path(config.to or checkpoint.with_name("explain.html"))
        data = page_data(checkpoint, config.start, config.snapshots)
    page = fill(to_text(data))
    write_whole(path, lambda file: file.write(page))
    print(f"{path}: {len(page) / 1e6:.1f} MB; open it in a browser")


def to_text(data: dict) -> str:
    """Encode data as ASCII JSON with < escaped, so that it cannot end the <script> element that holds it."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")


def fill(data: str) -> bytes:
    """Fill in page.html: replace each placeholder, such as {{model.js}}, with the script, style or data it names."""
    contents = {path.name: path.read_text(encoding="utf-8") for path in SOURCES.iterdir()}
    contents["data"] = data
    contents["checksum"] = f"{zlib.crc32(data.encode()):08x}"
    return re.sub(
        r"\{\{([\w.]+)\}\}", lambda name: contents[name[1]], contents["page.html"]
    ).encode()


if __name__ == "__main__":
    machine.run(main)
