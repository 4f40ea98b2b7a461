"""Damaged files of every kind that a program reads are refused in one line, or read as if they were whole.

A kind of file is a function in KINDS: it makes one in the current folder and returns its Target.
"""

import json
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from texts import make_pairs, make_text

import prepare_data
from humptygpt.cli import UserError
from humptygpt.data.dataset import Dataset, TokenDataset, read_meta
from humptygpt.data.pair_dataset import PairDataset

Damage = Callable[[bytes, random.Random], bytes]


class Target(NamedTuple):
    path: Path
    # returns all that a program takes from the file, to be compared; raises UserError
    read: Callable[[], object]
    damages: tuple[Damage, ...]


# --------------------------------------------------------------------------------------
# Damages


def flip_bytes(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 30])):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def cut_bytes(data: bytes, rng: random.Random) -> bytes:
    """Remove some bytes at the end or in the middle, or repeat some."""
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice([data[:start], data[:-1], data[:start] + data[end:], data[:end] + data[start:], b""])


WRONG_VALUES = [
    *(0, 1, -1, 2**31, 2**64, 10**4000, -(10**400), 1.5, 1e308, math.nan, math.inf),
    *("", "a", "\ud800", "../train.bin", "/dev/zero", "\0", "a\nb\r\x1b[2J", "x" * 100_000),
    *("AAAA", "byte", True, False, None, [], {}, [[]], [None], {"": None}, [0] * 1000),
]


def change_entry(content: object, rng: random.Random) -> object:
    """Remove, rename, double or move an entry at some depth, or give it a wrong value."""
    if not isinstance(content, dict | list) or not content or rng.random() < 0.15:
        return wrong_value(content, rng)
    entries = list(content.items() if isinstance(content, dict) else enumerate(content))
    number = rng.randrange(len(entries))
    key, value = entries[number]
    entries[number : number + 1] = rng.choice(
        [
            [],
            [(f"{key}x", value)],
            [(key, value), (f"{key}2", value)],
            [(key, rng.choice(entries)[1])],
            *[[(key, change_entry(value, rng))]] * 6,
        ]
    )
    return dict(entries) if isinstance(content, dict) else [value for _, value in entries]


def wrong_value(value: object, rng: random.Random) -> object:
    """Pick another value, often of the same type and near the right one."""
    near = []
    if type(value) in (int, float) and abs(value) < 2**64:
        near = [value + 1, value - 1, -value, 2 * value, float(value), str(value)]
    elif type(value) is str:
        at = rng.randrange(len(value) + 1)
        near = [value[:at] + char + value[at + 1 :] for char in "Aaé/0\n"]
        near += [value[:-1], value + "=", value[::-1], value.upper(), [value]]
    return rng.choice(near if near and rng.random() < 0.5 else WRONG_VALUES)


def change_json(data: bytes, rng: random.Random) -> bytes:
    content = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        content = change_entry(content, rng)
    return json.dumps(content).encode()


def replace_json(data: bytes, rng: random.Random) -> bytes:
    deep = rng.choice([b"[", b'{"a":', b'{"tokenizer":']) * 10**5
    return rng.choice([deep, b"1" * 10**4, b"\xef\xbb\xbf" + data, data.decode().encode("utf-16")])


class Code:
    """Its pickle runs code when it is loaded."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


# --------------------------------------------------------------------------------------
# Kinds of files


def read_data(folder: Path) -> list:
    """Read everything in a data folder that changes the numbers of a training."""
    meta = read_meta(folder)
    if meta["task"] == "translation":
        data: Dataset = PairDataset(folder, 200, seed=1, with_encoder=True, meta=meta)
        list(data.texts("val", 3))
    else:
        data = TokenDataset(folder, 16, seed=1, meta=meta)
    tokens = range(data.tokenizer.vocab_size)
    assert all(i in tokens for i in data.tokenizer.start())
    data.tokenizer.decode(tokens)
    assert 0 < data.val_bytes_per_token() < math.inf
    assert data.identity and data.summary(4, 2) and data.batches_per_epoch(4)
    read = [*data.chunks("train"), *data.chunks("val")]
    for batch in (data.batch(0, 4), *data.val_batches(4, 1)):
        read += batch.items()
    return [(key, values.tolist()) for key, values in read]


def prepared(name: str, *argv: str) -> Target:
    """Prepare data/damaged from documents or pairs, and target one of its files."""
    documents = [json.dumps({"text": make_text(n)}) + "\n" for n in range(50, 400, 5)]
    Path("docs.jsonl").write_text("".join(documents))
    Path("text.txt").write_text(make_text(4000))
    lines = (f"{source}\t{target}\n" for source, target in make_pairs())
    Path("pairs.tsv").write_text("".join(lines))
    prepare_data.main(["--name=damaged", *argv])
    folder = Path("data/damaged")
    damages = (flip_bytes, cut_bytes)
    if name == "meta.json":
        damages += (change_json, change_json, change_json, change_json, replace_json)
    return Target(folder / name, lambda: read_data(folder), damages)


DOCUMENTS, TEXT, PAIRS = (f"--input={name}" for name in ("docs.jsonl", "text.txt", "pairs.tsv"))
BYTE = "--tokenizer=byte"
SUBWORDS = ("--vocab_size=320", "--val_fraction=0.3")
KINDS: dict[str, Callable[[], Target]] = {
    "char": partial(prepared, "meta.json", TEXT),
    "byte": partial(prepared, "meta.json", DOCUMENTS, BYTE),
    "bpe": partial(prepared, "meta.json", DOCUMENTS, "--tokenizer=bpe", *SUBWORDS),
    "sentencepiece": partial(prepared, "meta.json", TEXT, "--tokenizer=sentencepiece", *SUBWORDS),
    "pairs": partial(prepared, "meta.json", PAIRS, BYTE),
    "train.bin": partial(prepared, "train.bin", TEXT),
    "val.bin, pairs": partial(prepared, "val.bin", PAIRS, BYTE),
}


# --------------------------------------------------------------------------------------
# The property


def check_damages(kind: str, target: Target, seeds: range) -> None:
    whole, expected = target.path.read_bytes(), target.read()
    refused = 0
    for seed in seeds:
        rng = random.Random(f"{kind} {seed}")
        damage = rng.choice(target.damages)
        target.path.write_bytes(damage(whole, rng))
        case = f"seed {seed}, {damage.__name__}"
        try:
            found = target.read()
        except UserError as error:
            refused += 1
            assert str(error) and not set(str(error)) & set("\n\r\x1b"), case
        except Exception as error:
            pytest.fail(f"{case}: {error!r}")
        else:
            assert found == expected, case
        assert not Path("ran").exists(), case
    assert refused > len(seeds) / 3


SEEDS = [range(60), pytest.param(range(60, 3000), marks=pytest.mark.long)]


@pytest.mark.parametrize("seeds", SEEDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_in_one_line_or_gives_the_same_and_never_runs_code(kind, seeds):
    check_damages(kind, KINDS[kind](), seeds)
