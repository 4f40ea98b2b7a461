"""Make an HTML page from a run. Its model runs in the page and shows every step of its computation as you type.

    python explain.py --out_dir=out/shakespeare_char
    python explain.py --out_dir=out/shakespeare_char --start="ROMEO: What light through yon"
    python explain.py --playground=playground.html     a page that trains a GPT, without a run

The page is one file: it opens from disk in any browser, without a network, and can be sent by email. It holds the
model's weights, rounded to 16 bits, the weights of the run's snapshots in 8 bits, the tokenizer, the losses, and the
beginning of the training text, on which it can go on with the training. With a chat model it has no such text, and
whoever opens it first talks to it.
"""

from dataclasses import dataclass
from pathlib import Path

from humptygpt import cli, machine
from humptygpt.cli import Except, Vain
from humptygpt.files import write_bytes
from humptygpt.page.html import fill, to_text
from humptygpt.sources import RunSource

IN_VAIN: Vain = [
    ("out_dir checkpoint start snapshots", "playground", Except([None])),
]
# torch takes seconds to import. main() imports it last, so that a misspelt key is reported at once.


@dataclass(frozen=True)
class ExplainConfig(RunSource):
    # page
    start: str | None = None  # text that the page shows first
    snapshots: bool = True  # include the weights of earlier steps in the page
    playground: str | None = None  # HTML file of a page that trains a GPT, without a run


def main(argv: list[str]) -> None:
    given = cli.read(argv, ExplainConfig)
    config = cli.make(ExplainConfig, given)
    cli.check_effects(given, cli.typed_keys(argv), vars(config), IN_VAIN)
    from humptygpt.formats.checkpoint import find_checkpoint
    from humptygpt.page.page_data import page_data, playground_data

    if config.playground:
        path, data = Path(config.playground), playground_data()
    else:
        checkpoint = find_checkpoint(Path(config.out_dir), config.checkpoint)
        path = checkpoint.with_name("explain.html")
        data = page_data(checkpoint, config.start, config.snapshots)
    page = fill("page.html", to_text(data))
    write_bytes(path, page)
    print(f"{path}: {len(page) / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    machine.run(main)
