import gzip
import zipfile
from pathlib import Path

import pytest
from backports import zstd
from conftest import with_constants
from prepared import contents, meta, prepare, tokenizer_of
from texts import make_pairs, make_text

import prepare_data
from humptygpt.data import builtin, pairs, vocabulary
from humptygpt.data.corpus import normalised
from humptygpt.data.pair_dataset import PairDataset
from humptygpt.download import download
from humptygpt.tokenizers.basic import END_OF_TEXT

BYTES = "mine --tokenizer=byte --val_fraction=0.2 --overwrite=True"
NONE_DROPPED = {"too_long": 0, "empty": 0, "lopsided": 0}
ROWS = make_pairs()


def write(path: str, data: str | bytes) -> str:
    """The text in a file, packed as its name says."""
    opened = {".gz": gzip.open, "zst": zstd.open}.get(path[-3:], open)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with opened(path, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return path


def write_tsv(path: str, rows: list[tuple[str, str]]) -> str:
    return write(path, "".join(f"{source}\t{target}\n" for source, target in rows))


def write_two(source: str, target: str, rows: list[tuple[str, str]]) -> None:
    for path, column in ((source, 0), (target, 1)):
        write(path, "".join(row[column] + "\n" for row in rows))


def pairs_of(name: str) -> dict[str, list[tuple[str, str]]]:
    """The pairs of each split of a data set, in order."""
    data = PairDataset(Path("data", name), 1000, seed=1, with_encoder=True)
    decode = data.tokenizer.decode
    return {split: [(decode(source[:-1]), target) for source, target in data.texts(split)] for split in data.splits}


def all_pairs(name: str = "mine") -> list[tuple[str, str]]:
    return sorted(pair for split in pairs_of(name).values() for pair in split)


# --------------------------------------------------------------------------------------
# Files of pairs


@pytest.mark.parametrize("kind", ["char", "byte", "bpe --vocab_size=330", "sentencepiece --vocab_size=330"])
def test_the_files_hold_the_pairs_in_their_order(folder, kind):
    # text that looks like the end-of-text token does not end a side
    rows = [*ROWS, (f"Was ist {END_OF_TEXT}?", f"What is {END_OF_TEXT}?")]
    write_tsv("own.tsv", rows)
    prepare(f"mine --input=own.tsv --val_fraction=0.2 --tokenizer={kind}")
    found = pairs_of("mine")
    assert set(found) == {"train", "val", "test"} and min(map(len, found.values())) >= 5
    for split in found.values():
        assert split == [pair for pair in rows if pair in split]
    assert all_pairs() == sorted(rows)


def test_meta_names_the_task_and_counts_both_sides_and_the_target(folder):
    rows = [(f"Das ist Café {n}.", f"This is café {n}.") for n in range(9)] + ROWS
    write_tsv("own.de-en.tsv", rows)
    prepare(f"--input=own.de-en.tsv {BYTES}")
    written = meta("mine")
    assert (written["task"], written["source"]) == ("translation", "own.de-en.tsv")
    for split, found in pairs_of("mine").items():
        sources, targets = (sum(len(row[side].encode()) for row in found) for side in (0, 1))
        counted = written["splits"][split]
        assert {key: counted[key] for key in pairs.Pairs.counts} == {
            "pairs": len(found),
            "characters": sum(len(source + target) for source, target in found),
            "bytes": sources + targets,
            "tokens": sources + targets + 2 * len(found),
            "target_bytes": targets,
            "target_tokens": targets + len(found),
        }
    assert written["pairs"] == 69
    assert written["longest"] == 1 + max(len(side.encode()) for row in rows for side in row)
    assert written["dropped"] == NONE_DROPPED


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_packed_file_gives_the_same_tokens(folder, packed):
    write_tsv("own.tsv", ROWS)
    prepare(f"--input=own.tsv {BYTES}")
    plain = contents("mine")
    write_tsv(f"own.tsv{packed}", ROWS)
    prepare(f"--input=own.tsv{packed} {BYTES}")
    own = contents("mine")
    assert all(plain[name] == own[name] for name in ("train.bin", "val.bin", "test.bin"))


def test_a_file_in_the_data_folder_needs_no_input(folder):
    write_tsv("data/mine/input.tsv", ROWS)
    prepare(BYTES)
    assert all_pairs() == sorted(ROWS)


def test_spaces_are_trimmed_and_collapsed(folder):
    messy = [(f"  {de.replace(' ', '  ')}", f"{en.replace(' ', chr(160))} ") for de, en in ROWS]
    write("own.tsv", "".join(f"{source}\t{target}\r\n" for source, target in messy))
    prepare(f"--input=own.tsv {BYTES}")
    assert all_pairs() == sorted(ROWS)


# --------------------------------------------------------------------------------------
# Splits and dropped pairs


def test_the_same_source_is_never_in_two_splits_and_pairs_that_came_twice_are_kept(folder):
    rows = [(source, f"{target} {n}") for n in range(8) for source, target in ROWS]
    write_tsv("own.tsv", rows)
    prepare(f"--input=own.tsv {BYTES}")
    sources = [{source for source, _ in found} for found in pairs_of("mine").values()]
    assert sum(map(len, sources)) == len(ROWS) and min(map(len, sources)) > 4
    assert all_pairs() == sorted(rows)


@pytest.mark.parametrize(
    ("keys", "fractions"),
    [
        ("", {"val": 0.02, "test": 0.02}),
        ("--val_fraction=0.1", {"val": 0.1, "test": 0.1}),
    ],
)
def test_the_splits_have_about_the_requested_fractions(folder, keys, fractions):
    write_tsv("own.tsv", [(f"Satz {n}.", f"Sentence {n}.") for n in range(4000)])
    prepare(f"mine --input=own.tsv --tokenizer=byte {keys}")
    splits = meta("mine")["splits"]
    found = {split: entry["pairs"] / 4000 for split, entry in splits.items()}
    assert found.pop("train") and found == pytest.approx(fractions, rel=0.25)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_of_twenty_pairs_one_is_for_validation_and_one_for_the_test(folder, first):
    write_tsv("own.tsv", [*ROWS[first : first + 20], ("Leer.", "")])
    prepare("mine --input=own.tsv --tokenizer=byte")
    found = pairs_of("mine")
    assert (len(found["val"]), len(found["test"])) == (1, 1)
    assert len(found["train"]) == 18


def test_pairs_too_long_empty_or_lopsided_are_dropped_and_reported(folder, capsys):
    too_long = [("x" * 40, "y" * 20), ("y" * 20, "x" * 40)]
    empty = [("", "Empty."), ("Leer.", " ")]
    lopsided = [("a", "b" * 30), ("b" * 30, "a")]
    kept = [*ROWS, ("z" * 39, "z" * 39), ("c", "d" * 13)]  # the last two are at the limits
    write_tsv("own.tsv", [*kept, *too_long, *empty, *lopsided])
    prepare(f"--input=own.tsv --max_pair_tokens=40 {BYTES}")
    assert all_pairs() == sorted(kept)
    dropped = NONE_DROPPED | {"too_long": 2, "empty": 2, "lopsided": 2}
    assert (meta("mine")["dropped"], meta("mine")["longest"]) == (dropped, 40)
    reasons = "too_long 2, empty 2, lopsided 2"
    assert f"  dropped: {reasons}\n" in capsys.readouterr().out


def test_val_input_keeps_every_pair_that_has_both_sides(folder):
    odd = [("x" * 300, "y" * 300), ("a", "b" * 30)]
    write_tsv("own.tsv", [*ROWS, *odd])
    write_tsv("val.tsv", [*odd, ("Leer.", "")])
    prepare("mine --input=own.tsv --val_input=val.tsv --tokenizer=byte")
    assert pairs_of("mine") == {"train": ROWS, "val": odd}


def test_given_validation_and_test_splits_keep_every_pair_that_has_both_sides(folder):
    odd = [("x" * 300, "y" * 300), ("a", "b" * 30)]
    empty = [("Leer.", "")]
    write_multi30k({"train": [*ROWS, *odd], "val": odd + empty, "test": odd[::-1]})
    prepare("translate_de_en --tokenizer=byte")
    assert pairs_of("translate_de_en") == {"train": ROWS, "val": odd, "test": odd[::-1]}
    written = meta("translate_de_en")
    dropped = NONE_DROPPED | {"too_long": 1, "empty": 1, "lopsided": 1}
    assert (written["dropped"], written["longest"]) == (dropped, 301)


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("Wo wohnst du?", "wo\u00a0wohnst  DU…", True),
        ("Straße", "STRASSE", True),
        ("Müll", "Mu\u0308ll", True),
        ("5 Euro", "6 Euro", False),
    ],
)
def test_sources_are_compared_by_their_words(a, b, same):
    assert (normalised(a) == normalised(b)) == same


def test_the_tokenizer_is_trained_on_both_sides_of_the_training_pairs_only(folder, monkeypatch):
    seen = []

    def recorded(texts, *args, **options):
        seen.extend(texts)
        return vocabulary.train_byte_pairs(seen, *args, **options)

    monkeypatch.setitem(vocabulary.TRAINERS, "bpe", recorded)
    write_tsv("own.tsv", ROWS)
    prepare("mine --input=own.tsv --tokenizer=bpe --vocab_size=300 --val_fraction=0.2")
    assert seen == [side for row in pairs_of("mine")["train"] for side in row]


def test_the_summary_shows_the_pairs_of_each_split(folder, capsys):
    write_multi30k({"train": ROWS, "val": ROWS[:9], "test": ROWS[:8]})
    prepare("translate_de_en --vocab_size=330")
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert rows[1:3] == ["total train val test", "pairs 77 60 9 8"]


# --------------------------------------------------------------------------------------
# Built-in data sets


def write_multi30k(splits: dict[str, list[tuple[str, str]]]) -> None:
    """The files of Multi30k, as if they had been downloaded."""
    for split, rows in splits.items():
        name = {"test": "test_2016_flickr"}.get(split, split)
        write_two(*(f"data/downloads/multi30k/{name}.{side}.gz" for side in ("de", "en")), rows)


GIVEN = {"train": ROWS[:40], "val": ROWS[40:50], "test": ROWS[50:]}


def test_the_public_files_are_downloaded_once_and_verified(folder, monkeypatch):
    fetched = {}

    def fake(url, path, sha256):
        fetched[path.name] = sha256
        split, language, _ = path.name.split(".")
        rows = GIVEN[split.removesuffix("_2016_flickr")]
        write(str(path), "".join(row[language == "en"] + "\n" for row in rows))
        return path

    monkeypatch.setattr("humptygpt.download.download", fake)
    prepare("translate_de_en --vocab_size=330")
    assert fetched == builtin.data_set("translate_de_en").MULTI30K_SHA256
    assert meta("translate_de_en")["source"] == "Multi30k"
    assert tokenizer_of("translate_de_en") == "sentencepiece"
    monkeypatch.setattr("humptygpt.download.download", download)
    prepare("translate_de_en --tokenizer=char --overwrite=True")
    assert pairs_of("translate_de_en") == GIVEN


EVERYDAY = [(f"{german} {n} Hunde.", f"I see {n} dogs.") for german in ("Ich sehe", "Da sind") for n in range(20)]
EVERYDAY += [
    ("Ich sehe 3 Hunde!", "I can see three dogs."),
    # str.splitlines would break lines here
    ("Ich sehe\x85 100 Hunde.", "I see\u2028 100\f dogs."),
    (ROWS[0][0], "Like a caption."),
]


def write_tatoeba(path: str) -> None:
    """The zip file as it is published: English first, and in later ones a column of credits."""
    lines = [f"{english}\t{german}\tCC-BY 2.0" for german, english in EVERYDAY]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("deu.txt", "\n".join(lines))


@pytest.fixture
def everyday(folder, monkeypatch):
    """The downloaded files, of which 6 pairs go to test and 4 to validation."""
    with_constants(monkeypatch, "everyday_de_en", TATOEBA_TEST=6, TATOEBA_VAL=4)
    write_multi30k(GIVEN)
    write_tatoeba("data/downloads/tatoeba/deu-eng.zip")


def test_no_sentence_of_one_split_is_in_another_in_either_language(everyday):
    prepare("everyday_de_en --tokenizer=byte")
    splits = pairs_of("everyday_de_en")
    assert (len(splits["val"]), len(splits["test"])) == (len(GIVEN["val"]) + 4, 6)
    # one pair of each component of validation and test; most have two
    assert 0 <= len(EVERYDAY) - 2 * 10 - len(set(splits["train"]) & set(EVERYDAY)) <= 1
    assert {*GIVEN["train"], EVERYDAY[-1]} < set(splits["train"])
    sides = {
        split: {normalised(text) for row in rows for text in row if row in EVERYDAY} for split, rows in splits.items()
    }
    assert sides["train"].isdisjoint(sides["val"] | sides["test"])
    assert sides["val"].isdisjoint(sides["test"])


# --------------------------------------------------------------------------------------
# Bad input

BAD = {
    "tab.tsv has no pairs; each line must be SOURCE, one tab, TARGET: tab.tsv, line 2: ": "--input=tab.tsv",
    "empty.tsv has no pairs; each line must be SOURCE": "--input=empty.tsv",
    "cannot read damaged.tsv.gz: ": "--input=damaged.tsv.gz",
    "train.bin would have 0 tokens, but needs at least 2; add text, or change the --val_f": (
        "--input=own.tsv --max_pair_tokens=2 --tokenizer=byte"
    ),
    "max_pair_tokens=9 has no effect with task=language modelling": ("--input=own.txt --max_pair_tokens=9"),
}


@pytest.mark.parametrize("complaint", BAD)
def test_bad_input_is_one_line_that_names_the_place(folder, fails, complaint):
    write_tsv("own.tsv", ROWS)
    write("own.txt", make_text())
    write("tab.tsv", "\nno tab\n")
    write("empty.tsv", "\t\n\na\t\n")
    packed = Path(write_tsv("damaged.tsv.gz", ROWS))
    packed.write_bytes(packed.read_bytes()[:-20])
    assert complaint in fails(prepare_data.main, "mine", *BAD[complaint].split())
    assert not Path("data/mine/meta.json").exists()
