"""Everyday sentences from the Tatoeba project, with validation and test splits, and Multi30k, to translate.

A sentence can have several translations, which in turn can have other translations. All sentences connected in this
way, a connected component, go to the same split, so that no sentence, in either language, is in two splits.
Validation and test use one pair from each component.
"""

import io
import zipfile
from collections import defaultdict
from itertools import chain
from pathlib import Path

from humptygpt.data.builtin import DOWNLOADS, data_set, keep
from humptygpt.data.corpus import draw, normalised
from humptygpt.data.documents import Flaws
from humptygpt.data.pairs import read_pairs
from humptygpt.download import download

TATOEBA_URL = (
    "https://raw.githubusercontent.com/rioyshky/translation/de48b7027f7318d77010a6e08ed928c10748c23d/deu-eng.zip"
)
TATOEBA_SHA256 = "b7688f84f99fa33c17397c14d8bd9cef1fdeb2ee0bf50074767023aee8926e28"
TATOEBA_TEST = 2000  # pairs in the test split
TATOEBA_VAL = 1000  # pairs in the validation split

vocab_size = 16_384


def fetch(config):
    captions, source = data_set("translate_de_en").fetch(config)
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
        files.append((split, keep(f"{config.name}/{split}.tsv", lines)))
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
