import gzip
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from backports import zstd
from conftest import make_pairs, make_text
from test_prepare_data import contents, full_disk, meta, unreachable

import prepare_data
from humptygpt import token_files
from humptygpt.prepare import corpus as corpus_module
from humptygpt.prepare import encoding
from humptygpt.prepare import sources as known_texts
from humptygpt.tokenizers import (
    END_OF_TEXT,
    BytePairTokenizer,
    from_state,
)
from humptygpt.translation import pairs

SMALL = ["--name=mine", "--tokenizer=sentencepiece", "--vocab_size=330"]
BYTES = ["--overwrite=True", "--name=mine", "--tokenizer=byte", "--val_fraction=0.2"]


def write(path: str, data: str | bytes) -> str:
    """The text in a file, packed as its name says."""
    opened = {".gz": gzip.open, "zst": zstd.open}.get(path[-3:], open)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with opened(path, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return path


def write_tsv(path: str, rows: list[tuple[str, str]]) -> str:
    return write(path, "".join(f"{source}\t{target}\n" for source, target in rows))


def write_two(source: str, target: str, rows: list[tuple[str, str]]) -> list[str]:
    for path, column in ((source, 0), (target, 1)):
        write(path, "".join(row[column] + "\n" for row in rows))
    return [f"--source={source}", f"--target={target}"]


def pairs_of(name: str) -> dict[str, list[tuple[str, str]]]:
    """The pairs of each split of a data set, from its tokens: source, end of text, target, end of text."""
    folder = Path("data", name)
    written, found = token_files.read_meta(folder), {}
    tokenizer = from_state(written["tokenizer"])
    for split in written["splits"]:
        tokens = token_files.TokenFiles(folder, split, written)
        ids = tokens.read(np.array([0]), len(tokens))[0]
        sides = np.split(ids, (ids == tokenizer.eot).nonzero()[0] + 1)
        assert len(sides[-1]) == 0 and len(sides) % 2 == 1
        texts = [tokenizer.decode(side[:-1]) for side in sides[:-1]]
        found[split] = list(zip(texts[::2], texts[1::2], strict=True))
    return found


def all_pairs(name: str) -> list[tuple[str, str]]:
    return [pair for split in pairs_of(name).values() for pair in split]


# --------------------------------------------------------------------------------------
# Files of pairs


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe", "sentencepiece"])
def test_the_files_hold_the_pairs_in_their_order(folder, tokenizer):
    size = [] if tokenizer in ("char", "byte") else ["--vocab_size=330"]
    write_tsv("own.tsv", make_pairs())
    prepare_data.main(
        ["mine", "--input=own.tsv", "--val_fraction=0.2", f"--tokenizer={tokenizer}", *size]
    )
    found = pairs_of("mine")
    assert set(found) == {"train", "val", "test"} and min(map(len, found.values())) >= 5
    for split in found.values():
        assert split == [pair for pair in make_pairs() if pair in split]
    assert sorted(all_pairs("mine")) == sorted(make_pairs())


def test_meta_names_the_task_and_counts_both_sides_and_the_target(folder):
    all_rows = [
        *make_pairs(),
        *[(f"Das ist Café {number}.", f"This is café {number}.") for number in range(9)],
    ]
    write_tsv("own.de-en.tsv", all_rows)
    prepare_data.main(["--input=own.de-en.tsv", *BYTES])
    written = meta("mine")
    assert (written["task"], written["source"]) == ("translation", "own.de-en.tsv")
    for split, rows in pairs_of("mine").items():
        counted = written["splits"][split]
        sources, targets = (sum(len(row[side].encode()) for row in rows) for side in (0, 1))
        assert counted["pairs"] == len(rows)
        assert counted["characters"] == sum(len(side) for row in rows for side in row)
        assert (counted["bytes"], counted["tokens"]) == (
            sources + targets,
            sources + targets + 2 * len(rows),
        )
        assert (counted["target_bytes"], counted["target_tokens"]) == (
            targets,
            targets + len(rows),
        )
    assert written["pairs"] == 69 and written["tokens"] == sum(
        split["tokens"] for split in written["splits"].values()
    )
    assert written["longest"] == 1 + max(
        len(side.encode()) for row in all_rows for side in row
    )
    assert written["dropped"] == {"too_long": 0, "empty": 0, "lopsided": 0, "held_out": 0}
    assert written["tokenizer"] == {"tokenizer": "byte", "separated": True}
    assert (
        written["command"]
        == "python prepare_data.py mine --input=own.de-en.tsv --val_fraction=0.2 --tokenizer=byte"
    )


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_a_tsv_and_two_aligned_files_give_the_same_tokens(folder, packed):
    prepare_data.main([f"--input={write_tsv(f'own.tsv{packed}', make_pairs())}", *BYTES])
    one = contents("mine")
    prepare_data.main([*write_two(f"a.de{packed}", f"a.en{packed}", make_pairs()), *BYTES])
    two = contents("mine")
    assert all(one[name] == two[name] for name in ("train.bin", "val.bin", "test.bin"))
    assert meta("mine")["source"] == f"a.de{packed} and a.en{packed}"


def test_a_file_in_the_data_folder_needs_no_input(folder):
    write_tsv("data/mine/input.tsv", make_pairs())
    prepare_data.main(BYTES)
    assert sorted(all_pairs("mine")) == sorted(make_pairs())


def test_spaces_are_trimmed_and_collapsed(folder):
    messy = [
        (f"  {source.replace(' ', '  ')}", f"{target.replace(' ', chr(160) + ' ')} ")
        for source, target in ROWS
    ]
    write("own.tsv", "".join(f"{source}\t{target}\r\n" for source, target in messy))
    prepare_data.main(["--input=own.tsv", *BYTES])
    assert sorted(all_pairs("mine")) == sorted(ROWS)
    write_two(
        "a.de", "a.en", [(source.replace(" ", "\t"), target) for source, target in ROWS]
    )
    prepare_data.main(["--source=a.de", "--target=a.en", *BYTES])
    assert sorted(all_pairs("mine")) == sorted(ROWS)


ROWS = make_pairs()


def test_bytes_that_are_not_utf8_can_be_replaced(folder):
    path = Path(write_tsv("own.tsv", ROWS))
    path.write_bytes(path.read_bytes() + b"Gr\xfcn ist es.\tIt is green.\n")
    prepare_data.main(["--input=own.tsv", "--encoding_errors=replace", *BYTES])
    assert ("Gr\ufffdn ist es.", "It is green.") in all_pairs("mine")


def test_characters_outside_the_vocabulary_are_encoded_as_bytes_and_nothing_is_lost(folder):
    strange = [
        ("Was heißt 鳥🙂?", "What does 鳥🙂 mean?"),
        ("Ein ▁ und ein ĳ.", "A ▁ and an ĳ."),
    ]
    splits = {"train": ROWS, "val": strange, "test": strange}
    write_multi30k(splits)
    prepare_data.main(["translate_de_en", "--vocab_size=330"])
    assert pairs_of("translate_de_en") == splits
    assert meta("translate_de_en")["characters_spelled_in_bytes"] > 0


def test_text_that_looks_like_the_end_of_text_token_does_not_end_a_side(folder):
    rows = [*ROWS, (f"Was ist {END_OF_TEXT}?", f"What is {END_OF_TEXT}?")]
    write_tsv("own.tsv", rows)
    prepare_data.main(["--input=own.tsv", *SMALL])
    assert sorted(all_pairs("mine")) == sorted(rows)


# --------------------------------------------------------------------------------------
# Splits and dropped pairs


def test_the_same_source_is_never_in_two_splits(folder):
    rows = [
        (source, f"{target} {number}") for number in range(8) for source, target in ROWS
    ]
    write_tsv("own.tsv", rows)
    prepare_data.main(["--input=own.tsv", *BYTES])
    sources = {
        split: {source for source, _ in rows} for split, rows in pairs_of("mine").items()
    }
    assert (
        sum(map(len, sources.values())) == len(ROWS) and min(map(len, sources.values())) > 4
    )
    assert sorted(all_pairs("mine")) == sorted(rows)  # those that came twice are kept


def test_the_splits_have_about_the_requested_fractions(folder):
    rows = [(f"Satz {number}.", f"Sentence {number}.") for number in range(4000)]
    write_tsv("own.tsv", rows)
    for argv, val, test in (
        ([], 0.02, 0.02),
        (["--val_fraction=0.1"], 0.1, 0.1),
        (["--val_fraction=0.1", "--test_fraction=0.3"], 0.1, 0.3),
    ):
        prepare_data.main([*BYTES[:3], "--input=own.tsv", *argv])
        found = pairs_of("mine")
        assert len(found["val"]) == pytest.approx(4000 * val, rel=0.25)
        assert len(found["test"]) == pytest.approx(4000 * test, rel=0.25)


def test_a_test_fraction_of_0_gives_no_test_split(folder):
    write_tsv("own.tsv", ROWS)
    prepare_data.main(["--input=own.tsv", *BYTES])
    assert Path("data/mine/test.bin").exists()
    prepare_data.main(["--input=own.tsv", "--test_fraction=0", *BYTES])
    assert set(contents("mine")) == {"train.bin", "val.bin", "meta.json", "command.txt"}
    assert set(meta("mine")["splits"]) == {"train", "val"}


def test_more_pairs_change_nothing_for_those_that_were_there(folder):
    write_tsv("few.tsv", ROWS[::2])
    write_tsv("more.tsv", ROWS[::-1])
    prepare_data.main(["few", "--input=few.tsv", *BYTES[2:]])
    prepare_data.main(["more", "--input=more.tsv", *BYTES[2:]])
    few, more = pairs_of("few"), pairs_of("more")
    assert all(few[split] and set(few[split]) < set(more[split]) for split in few)


def test_three_sources_give_three_splits_of_one(folder):
    for number in range(8):
        write_tsv(
            "own.tsv", [(f"{number} {word}", "x") for word in ("eins", "zwei", "drei")]
        )
        prepare_data.main(["--input=own.tsv", *BYTES[:3], "--val_fraction=0.001"])
        assert [len(split) for split in pairs_of("mine").values()] == [1, 1, 1]


def test_pairs_too_long_empty_or_lopsided_are_dropped_and_reported(folder, capsys):
    bad = [
        ("x" * 40, "y" * 20),
        ("y" * 20, "x" * 40),
        ("", "Empty."),
        ("Leer.", " "),
        ("a", "b" * 30),
        ("b" * 30, "a"),
    ]
    # the last two are just not too long
    write_tsv("own.tsv", [*ROWS, *bad, ("z" * 39, "z" * 39), ("c", "d" * 13)])
    prepare_data.main(["--input=own.tsv", "--max_pair_tokens=40", *BYTES])
    assert sorted(all_pairs("mine")) == sorted(
        [*ROWS, ("z" * 39, "z" * 39), ("c", "d" * 13)]
    )
    written = meta("mine")
    assert (
        written["dropped"] == {"too_long": 2, "empty": 2, "lopsided": 2, "held_out": 0}
        and written["longest"] == 40
    )
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("  dropped")).split(maxsplit=2)[
        2
    ] == (
        "2 longer than 40 tokens, 2 empty on one side,"
        " 2 with a side longer than 3 times the other plus 8 tokens"
    )
    prepare_data.main(
        ["--input=own.tsv", "--max_pair_tokens=40", "--max_pair_ratio=15", *BYTES]
    )
    assert meta("mine")["dropped"]["lopsided"] == 0


def test_given_validation_and_test_splits_keep_every_pair_that_has_both_sides(folder):
    odd = [("x" * 300, "y" * 300), ("a", "b" * 30)]
    empty = [("Leer.", "")]
    write_multi30k({"train": [*ROWS, *odd], "val": odd + empty, "test": odd[::-1]})
    prepare_data.main(["translate_de_en", "--tokenizer=byte"])
    assert pairs_of("translate_de_en") == {"train": ROWS, "val": odd, "test": odd[::-1]}
    written = meta("translate_de_en")
    assert (
        written["dropped"] == {"too_long": 1, "empty": 1, "lopsided": 1, "held_out": 0}
        and written["longest"] == 301
    )
    assert written["splits"]["train"]["pairs"] == 60


HELD_OUT = [
    ("wo  WOHNST du", "Where are you living?"),
    ("Grüß dich!", "Hi!"),
    ("„Der Hund: schläft“…", "It sleeps."),
]


@pytest.mark.parametrize("name", ["held.tsv", "held.tsv.gz", "held.txt"])
def test_held_out_sentences_are_in_no_split_that_is_drawn(folder, capsys, name):
    lines = [
        f"{source}\t{target}" if ".tsv" in name else source for source, target in HELD_OUT
    ]
    write(name, "\n".join([*lines, ""]))
    write_tsv(
        "own.tsv", [*ROWS, ("WO WOHNST DU", "Where"), ("Wo wohnst du nun?", "Where now?")]
    )
    prepare_data.main(["--input=own.tsv", f"--held_out={name}", *BYTES])
    left = [row for row in ROWS if row[0] not in ("Wo wohnst du?", "Der Hund schläft.")]
    assert sorted(all_pairs("mine")) == sorted([*left, ("Wo wohnst du nun?", "Where now?")])
    assert meta("mine")["dropped"] == {
        "too_long": 0,
        "empty": 0,
        "lopsided": 0,
        "held_out": 3,
    }
    assert re.search(
        r"^  dropped pairs  3 held out$", capsys.readouterr().out, re.MULTILINE
    )


def test_what_translations_connect_with_a_held_out_sentence_is_held_out_too(folder):
    connected = [
        ("Ja.", "Yes."),
        ("Gewiss.", "Sure."),
        ("Ja, gern!", "Yes!"),
        ("Ja, gern!", "Sure!"),
    ]
    write_tsv("own.tsv", [*ROWS, *connected])
    write("held.txt", "gewiss\n")
    prepare_data.main(["--input=own.tsv", "--held_out=held.txt", *BYTES])
    assert sorted(all_pairs("mine")) == sorted(ROWS)
    assert meta("mine")["dropped"]["held_out"] == len(connected)


def test_with_held_out_sentences_no_source_of_a_given_validation_or_test_split_is_trained_on(
    folder,
):
    val, test = (
        [("Ich bin müde!", "I'm tired."), *ROWS[:2]],
        [("gute nacht", "Good night"), *ROWS[2:5]],
    )
    write_multi30k({"train": ROWS, "val": val, "test": test})
    prepare_data.main(["translate_de_en", "--tokenizer=byte"])
    assert pairs_of("translate_de_en") == {"train": ROWS, "val": val, "test": test}
    write("held.txt", "Vielen Dank\n")
    held_out = ["--held_out=held.txt", "--overwrite=True"]
    prepare_data.main(["translate_de_en", "--tokenizer=byte", *held_out])
    left_out = {
        "Ich bin müde.",
        "Gute Nacht!",
        "Vielen Dank!",
        *(source for source, _ in ROWS[:5]),
    }
    train = [row for row in ROWS if row[0] not in left_out]
    assert pairs_of("translate_de_en") == {"train": train, "val": val, "test": test}
    assert (
        meta("translate_de_en")["dropped"]["held_out"]
        == len(left_out)
        == len(ROWS) - len(train)
    )


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("Wo wohnst du?", "wo\u00a0wohnst  DU…", True),
        ("Straße", "STRASSE", True),
        ("Müll", "Mu\u0308ll", True),
        ("Geht's?", "Geht s", True),
        ("5 Euro", "6 Euro", False),
        ("zu frieden", "zufrieden", False),
    ],
)
def test_sources_are_compared_by_their_words_alone(a, b, same):
    assert (pairs.normalised(a) == pairs.normalised(b)) == same


def test_a_stopped_preparation_resumes_but_starts_over_where_held_out_sentences_changed(
    folder, capsys, monkeypatch
):
    monkeypatch.setattr(corpus_module, "UNIT", 200)
    monkeypatch.setattr(encoding, "SAVE_UNITS", 1)
    write_tsv("own.tsv", ROWS)
    for change, printed in (
        ("Vielen Dank!\n", "resuming after"),
        ("Guten Morgen!\nVielen Dank!\n", "starting over"),
    ):
        shutil.rmtree("data/mine", ignore_errors=True)
        write("held.txt", "Vielen Dank!\n")
        os.utime("held.txt", (1, 1))
        with full_disk(10):
            prepare_data.main(["--input=own.tsv", "--held_out=held.txt", *BYTES])
        write("held.txt", change)
        os.utime("held.txt", (1, 1))
        capsys.readouterr()
        prepare_data.main(["--input=own.tsv", "--held_out=held.txt", *BYTES])
        assert printed in capsys.readouterr().err
        assert sorted(all_pairs("mine")) == sorted(
            row for row in ROWS if row[0] not in change
        )


def test_the_tokenizer_is_trained_on_both_sides_of_the_training_pairs_alone(
    folder, monkeypatch
):
    seen = []
    original = BytePairTokenizer.train

    def recorded(texts, vocab_size, separated):
        seen.append(list(texts))
        return original(seen[-1], vocab_size, separated)

    monkeypatch.setattr(BytePairTokenizer, "train", recorded)
    write_tsv("own.tsv", ROWS)
    keys = ["--tokenizer=bpe", "--vocab_size=300", "--val_fraction=0.2"]
    prepare_data.main(["mine", "--input=own.tsv", *keys])
    assert seen == [[side for row in pairs_of("mine")["train"] for side in row]]


def test_the_summary_shows_the_splits_and_three_pairs(folder, capsys):
    write_multi30k({"train": ROWS, "val": ROWS[:9], "test": ROWS[:8]})
    prepare_data.main(["translate_de_en", "--vocab_size=330"])
    lines = capsys.readouterr().out.splitlines()
    rows = [" ".join(line.split()) for line in lines]
    assert (
        rows[0]
        == "data/translate_de_en: train, val and test_2016_flickr in data/translate_de_en"
    )
    assert rows[1:3] == ["total training validation test", "pairs 77 60 9 8"]
    assert rows[-7].startswith("longest side ") and rows[-7].endswith(
        " tokens, end-of-text included"
    )
    assert rows[-6] == "dropped pairs none"
    assert rows[-5:-2] == [
        f"{'examples ' * (i == 0)}{source} -> {target}"
        for i, (source, target) in enumerate(ROWS[:3])
    ]


# --------------------------------------------------------------------------------------
# Available by name


def write_multi30k(
    splits: dict[str, list[tuple[str, str]]],
    packed: str = ".gz",
    leave_out: str = "",
    folder="data/translate_de_en",
) -> None:
    """The folder with files under their public names."""
    for split, rows in splits.items():
        name = f"{folder}/" + {"test": "test_2016_flickr"}.get(split, split)
        write_two(f"{name}.de{packed}", f"{name}.en{packed}", rows)
    if leave_out:
        Path(folder, leave_out).unlink()


GIVEN = {"train": ROWS[:40], "val": ROWS[40:50], "test": ROWS[50:]}


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_users_files_under_their_public_names_come_before_any_download(
    folder, monkeypatch, packed
):
    monkeypatch.setattr(known_texts, "download", None)
    write_multi30k(GIVEN, packed)
    prepare_data.main(["translate_de_en", "--vocab_size=330"])
    assert pairs_of("translate_de_en") == GIVEN
    written = meta("translate_de_en")
    assert written["tokenizer"]["tokenizer"] == "sentencepiece"
    assert written["source"] == "train, val and test_2016_flickr in data/translate_de_en"
    # a user's file is left alone
    assert (Path("data/translate_de_en") / f"train.de{packed}").exists()


def test_the_public_files_are_downloaded_once_and_verified(folder, monkeypatch):
    fetched = {}

    def fake(url, path, sha256):
        fetched[path.name] = sha256
        split, language = path.name.removesuffix(".gz").rsplit(".", 1)
        rows = GIVEN[split.removesuffix("_2016_flickr")]
        write(str(path), "".join(row[language == "en"] + "\n" for row in rows))

    monkeypatch.setattr(known_texts, "download", fake)
    prepare_data.main(["translate_de_en", "--vocab_size=330"])
    assert fetched == known_texts.MULTI30K_SHA256
    assert (
        meta("translate_de_en")["source"] == "Multi30k"
        and pairs_of("translate_de_en") == GIVEN
    )
    monkeypatch.setattr(known_texts, "download", None)
    prepare_data.main(["translate_de_en", "--tokenizer=char", "--overwrite=True"])
    assert pairs_of("translate_de_en") == GIVEN


EVERYDAY = [
    (f"{german} {n} Hunde.", f"I see {n} dogs.")
    for german in ("Ich sehe", "Da sind")
    for n in range(20)
]
EVERYDAY += [
    ("Ich sehe 3 Hunde!", "I can see three dogs."),
    # no line breaks, though str.splitlines takes them for such
    ("Ich sehe\x85 100 Hunde.", "I see\u2028 100\f dogs."),
    (ROWS[0][0], "Like a caption."),
]


def write_tatoeba(path: str, rows=EVERYDAY, name="deu.txt") -> str:
    """The zip file as it is published: English first, and in later ones a column of credits."""
    lines = [f"{english}\t{german}\tCC-BY 2.0" for german, english in rows]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, "\n".join(lines))
    return path


@pytest.fixture
def everyday(folder, monkeypatch):
    """Files in data/everyday_de_en, of which 6 pairs go to test and 4 to validation."""
    monkeypatch.setattr(known_texts, "download", None)
    monkeypatch.setattr(known_texts, "TATOEBA_TEST", 6)
    monkeypatch.setattr(known_texts, "TATOEBA_VAL", 4)
    write_multi30k(GIVEN, folder="data/everyday_de_en")
    write_tatoeba("data/everyday_de_en/deu-eng.zip")


def test_no_sentence_of_one_split_is_in_another_in_either_language(everyday):
    prepare_data.main(["everyday_de_en", "--tokenizer=byte"])
    splits = pairs_of("everyday_de_en")
    assert len(splits["val"]) == len(GIVEN["val"]) + 4
    assert len(splits["test"]) == 6
    # one pair of each component of validation and test; most have two
    assert 0 <= len(EVERYDAY) - 2 * 10 - len(set(splits["train"]) & set(EVERYDAY)) <= 1
    assert {*GIVEN["train"], EVERYDAY[-1]} < set(splits["train"])
    sides = {
        split: {pairs.normalised(text) for row in rows for text in row if row in EVERYDAY}
        for split, rows in splits.items()
    }
    assert sides["train"].isdisjoint(sides["val"] | sides["test"])
    assert sides["val"].isdisjoint(sides["test"])
    assert "manythings.org/anki, CC-BY 2.0 FR" in meta("everyday_de_en")["source"]


def test_todays_file_is_taken_with_a_note_where_that_of_2018_cannot_be_reached(
    everyday, monkeypatch, capsys
):
    Path("data/everyday_de_en/deu-eng.zip").unlink()

    def only_today(url, path, sha256=None):
        if sha256:
            unreachable(url, path, sha256)
        write_tatoeba(str(path))

    monkeypatch.setattr(known_texts, "download", only_today)
    prepare_data.main(["everyday_de_en", "--tokenizer=byte"])
    assert "no route; trying https://www.manythings.org/anki" in capsys.readouterr().err
    assert len(pairs_of("everyday_de_en")["test"]) == 6


def test_a_damaged_file_of_everyday_sentences_is_refused_in_one_line(everyday, fails):
    path = Path("data/everyday_de_en/deu-eng.zip")
    whole = path.read_bytes()
    other = Path(write_tatoeba("other.zip", name="fra.txt")).read_bytes()
    with zipfile.ZipFile("untabbed.zip", "w") as file:
        file.writestr("deu.txt", "Go. Geh.\n")
    untabbed = Path("untabbed.zip").read_bytes()
    flipped = bytearray(whole)
    flipped[60:90] = bytes(30)
    for content in (whole[: len(whole) // 2], bytes(flipped), other, untabbed, b"text"):
        path.write_bytes(content)
        complaint = fails(prepare_data.main, "everyday_de_en", "--tokenizer=byte")
        assert complaint.startswith(f"{path} is not a zip file with deu.txt"), complaint
        assert complaint.count("\n") == 1


def test_where_the_public_files_cannot_be_reached_the_message_names_the_files_to_put_where(
    folder, fails, monkeypatch
):
    monkeypatch.setattr(known_texts, "download", unreachable)
    complaint = fails(prepare_data.main, "translate_de_en")
    assert complaint.startswith("no sentence pairs for translate_de_en: ")
    assert "no route; put train.de.gz, train.en.gz" in complaint
    assert "test_2016_flickr.en.gz into data/translate_de_en/, or use --input=" in complaint
    assert not Path("data/translate_de_en").exists()


# --------------------------------------------------------------------------------------
# Bad input

BAD = {
    "tab.tsv, line 3 has 0 tabs; write a line as SOURCE, one tab, TARGET": [
        "--input=tab.tsv"
    ],
    "tabs.tsv, line 2 has 2 tabs; write a line": ["--input=tabs.tsv"],
    "empty.tsv has no pairs; write a line as SOURCE, one tab, TARGET; left out: {'empty': 3}": [
        "--input=empty.tsv"
    ],
    "latin1.tsv, line 2 is not UTF-8; set --encoding_errors=replace or ignore": [
        "--input=latin1.tsv"
    ],
    "damaged.tsv.gz is damaged: ": ["--input=damaged.tsv.gz"],
    "a.de has not as many lines as short.en; each line must": [
        "--source=a.de",
        "--target=short.en",
    ],
    "cannot read none.en: No such file": ["--source=a.de", "--target=none.en"],
    "source and target go together": ["--source=a.de"],
    "source and target go together, and without input": [
        "--input=own.tsv",
        "--source=a.de",
        "--target=a.en",
    ],
    "train.bin would have 0 tokens, but needs at least 2; change --val_fraction or add": [
        *("--input=own.tsv", "--max_pair_tokens=2", "--tokenizer=byte")
    ],
    "no text of one.tsv is in the training split; add text": ["--input=one.tsv"],
    "max_pair_tokens=9 has no effect without task=translation": [
        "--input=own.txt",
        "--max_pair_tokens=9",
    ],
    "latin1.txt, line 1 is not UTF-8; set --encoding_errors": [
        "--input=own.tsv",
        "--held_out=latin1.txt",
    ],
    "own.tsv has no pairs; write a line as SOURCE, one tab, TARGET; left out: {'held_out': 60}": [
        *("--input=own.tsv", "--held_out=own.tsv", "--tokenizer=byte")
    ],
}


@pytest.mark.parametrize("complaint", BAD)
def test_bad_input_is_one_line_that_names_the_place(folder, fails, complaint):
    write_tsv("own.tsv", ROWS)
    write("own.txt", make_text())
    write("tab.tsv", "a\tb\n\t\nno tab\na\tb\n")
    write("tabs.tsv", "a\tb\na\tb\tc\n")
    write("empty.tsv", "\t\n\na\t\n")
    write("one.tsv", "a\tb\n")
    write("latin1.tsv", b"a\tb\nGr\xfcn\tgreen\n")
    write("latin1.txt", b"Gr\xfcn\n")
    packed = Path(write_tsv("damaged.tsv.gz", ROWS))
    packed.write_bytes(packed.read_bytes()[:-20])
    write_two("a.de", "a.en", ROWS)
    write("short.en", Path("a.en").read_bytes()[: -len("All is well.\n")])
    assert complaint in fails(prepare_data.main, "mine", *BAD[complaint])
    assert not Path("data/mine/meta.json").exists()


def test_a_public_file_that_is_missing_is_named(folder, fails, monkeypatch):
    monkeypatch.setattr(known_texts, "download", None)
    write_multi30k(GIVEN, leave_out="val.en.gz")
    complaint = fails(prepare_data.main, "translate_de_en")
    assert complaint == "data/translate_de_en has no val.en.gz, with or without .gz\n"


def test_a_stopped_preparation_is_reported_with_the_command_that_resumes_it(
    folder, monkeypatch
):
    write_tsv("own.tsv", ROWS)
    monkeypatch.setattr(prepare_data, "make_meta", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_data.main(["--input=own.tsv", *BYTES])
    command = Path("data/mine/preparing/command.txt").read_text().strip()
    with pytest.raises(
        prepare_data.UserError, match="which a preparation writes last"
    ) as error:
        token_files.read_meta(Path("data/mine"))
    assert str(error.value).endswith(f"; prepare it again: {command}")
