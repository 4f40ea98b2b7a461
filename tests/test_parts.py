"""Parts of a corpus, joined, are what one machine makes of it."""

import json
import shutil
from pathlib import Path

import pytest
from texts import make_text

import prepare_data
from humptygpt.data.parts import parse_part

NAMES = ["meta.json", "train.bin", "val.bin", "command.txt"]


@pytest.fixture
def corpus(folder):
    """corpus/: ten files of several documents each, of very different sizes, one with carriage returns."""
    (folder / "corpus").mkdir()
    for number in range(9):
        lines = [
            json.dumps({"text": make_text(100 + 300 * number + line)}) for line in range(4)
        ]
        (folder / "corpus" / f"{number}.jsonl").write_text("\n".join(lines))
    (folder / "corpus" / "last.txt").write_bytes(
        b"one line\r\nand another\r\n" + make_text(500).encode()
    )
    return ["--input=corpus", "--name=mine", "--val_fraction=0.3"]


def contents(folder: Path = Path("data/mine")) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def prepare_parts(argv: list[str], count: int) -> None:
    for number in range(count, 0, -1):  # in any order
        prepare_data.main([*argv, f"--part={number}/{count}"])


def test_parts_of_a_corpus_whose_files_are_cut_are_joined_likewise(folder):
    Path("few").mkdir()
    for number in range(3):
        Path(f"few/{number}.txt").write_text(make_text(1000 + 200 * number))
    argv = ["--input=few", "--name=mine"]
    prepare_data.main(argv)
    one = contents()
    shutil.rmtree("data/mine")
    prepare_parts(argv, 2)
    prepare_data.main([*argv, "--join=True"])
    assert contents() == one


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--tokenizer=byte"],
        ["--tokenizer=sentencepiece", "--vocab_size=300", "--shard_tokens=5000"],
    ],
)
def test_joined_parts_have_the_bytes_that_one_machine_makes(corpus, count, options):
    argv = [*corpus, *options]
    prepare_data.main(argv)
    one = contents()
    shutil.rmtree("data/mine")
    prepare_parts(argv, count)
    prepare_data.main([*argv, "--join=True"])
    assert contents() == one


def test_a_part_that_is_missing_foreign_or_damaged_is_named(corpus, fails):
    join = [*corpus, "--join=True"]
    assert "data/mine/parts must have all parts of one count" in fails(
        prepare_data.main, *join
    )
    prepare_parts(corpus, 3)
    part = Path("data/mine/parts/2_of_3")
    kept = contents(part)
    shutil.rmtree(part)
    missing = fails(prepare_data.main, *join)
    assert missing.startswith(
        "part 2/3 in data/mine/parts/2_of_3 cannot be joined: [Errno 2] No such file"
    )
    assert missing.rstrip().endswith("--part=2/3")
    prepare_data.main([*corpus, "--part=2/3", "--tokenizer=byte"])
    assert (
        "part 2/3 in data/mine/parts/2_of_3 cannot be joined: it is of other files"
        in fails(prepare_data.main, *join)
    )
    prepare_data.main([*corpus, "--part=2/3"])
    assert contents(part) == kept
    damaged = bytearray(kept["train.bin"])
    damaged[10] ^= 1
    (part / "train.bin").write_bytes(damaged)
    assert (
        "part 2/3 in data/mine/parts/2_of_3 cannot be joined: train.bin is damaged"
        in fails(prepare_data.main, *join)
    )
    prepare_data.main([*corpus, "--part=1/2"])
    assert "data/mine/parts must have all parts of one count" in fails(
        prepare_data.main, *join
    )
    assert not Path("data/mine/meta.json").exists()


def test_what_has_no_parts_is_refused(folder, fails):
    (folder / "single.txt").write_text(make_text())
    (folder / "pairs.tsv").write_text("a\tb\nc\td\n" * 20)
    for name in ("single.txt", "pairs.tsv"):
        line = fails(prepare_data.main, f"--input={name}", "--name=mine", "--part=1/2")
        assert line.startswith(f"{name} is not files of documents, but one text or pairs")


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3"])
def test_a_part_is_a_number_of_a_count(text):
    with pytest.raises(ValueError, match="must be NUMBER/COUNT"):
        parse_part(text)
