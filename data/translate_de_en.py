"""Multi30k: 29,000 image captions in German and English, to translate."""

from pathlib import Path

from humptygpt.data.builtin import DOWNLOADS, keep
from humptygpt.data.documents import Flaws, read_text
from humptygpt.download import download

MULTI30K_URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
MULTI30K_SHA256 = {
    "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
}
vocab_size = 4096


def fetch(config):
    folder = DOWNLOADS / "multi30k"
    paths = [download(MULTI30K_URL + file, folder / file, sha256) for file, sha256 in MULTI30K_SHA256.items()]
    files = zip(("train", "val", "test"), paths[::2], paths[1::2], strict=True)
    return [(split, joined(split, *sides)) for split, *sides in files], "Multi30k"


def joined(split: str, german: Path, english: Path) -> Path:
    """Write the lines of two aligned files as the two columns of one."""
    sides = zip(*(read_text(path, Flaws(), newline="\n") for path in (german, english)), strict=True)
    lines = ("\t".join(" ".join(side.split()) for side in pair) + "\n" for pair in sides)
    return keep(f"multi30k/{split}.tsv", "".join(lines))
