import json
import shlex
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, make_text

import prepare_data
import train
from humptygpt.data import dataset as datasets
from humptygpt.data.dataset import (
    META_FORMAT,
    TokenDataset,
    TokenFile,
    permute,
    read_meta,
    sha256,
)
from humptygpt.machine import random_key
from humptygpt.training import evaluation


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000])
def test_a_permutation_visits_every_index_once(n):
    for key in (1, 2, 12345678901234567):
        assert sorted(permute(np.arange(n), n, key)) == list(range(n))


def test_neighbours_in_a_permutation_are_unrelated():
    order = permute(np.arange(100_000), 100_000, random_key(7)).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02


def test_a_permutation_of_a_huge_range_stays_inside_it_and_takes_no_more_memory():
    def most_memory(n: int) -> int:
        tracemalloc.start()
        sent_to = permute(np.arange(12), n, 3)  # each number is below n
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(set(sent_to)) == 12 and sent_to.min() >= 0 and sent_to.max() < n
        return most

    most_memory(100)
    assert most_memory(10**11) < most_memory(100) + 1000 < 100_000


def starts_of(dataset: TokenDataset, index: int, batch_size: int) -> list[int]:
    """The position at which each block of a batch begins, in a text whose token number i is i."""
    return dataset.batch(index, batch_size)["idx"][:, 0].tolist()


@pytest.fixture
def counted(folder):
    """A data set whose token number i is i, so that a block shows its position."""
    data = folder / "data" / "counted"
    data.mkdir(parents=True)
    for split, n in (("train", 1003), ("val", 107)):
        np.arange(n, dtype=np.uint16).tofile(data / f"{split}.bin")
    alphabet = "".join(map(chr, range(0x4E00, 0x4E00 + 1003)))
    write_meta(data, {"tokenizer": "char", "alphabet": alphabet})
    return data


def write_meta(data: Path, tokenizer: dict) -> None:
    """A meta.json for the uint16 token files that lie in a folder."""
    splits = {}
    for split in ("train", "val"):
        path = data / f"{split}.bin"
        tokens = path.stat().st_size // 2
        splits[split] = {
            "sha256": sha256(path),
            "tokens": tokens,
            "bytes": tokens,
        }
    meta = {
        "format": META_FORMAT,
        "task": "language modelling",
        "source": "counting",
        "dtype": "uint16",
        "splits": splits,
        "tokenizer": tokenizer,
    }
    (data / "meta.json").write_text(json.dumps(meta))


def opened(seed: int = 1) -> TokenDataset:
    return TokenDataset(Path("data/counted"), 16, seed)


def test_an_epoch_visits_every_block_once_in_an_order_and_from_an_offset_of_its_own(
    counted,
):
    dataset = opened()
    blocks = (1003 - 1 - 16) // 16
    in_order = list(range(0, 16 * blocks, 16))
    offsets = set()
    orders = set()
    for epoch in range(10):
        starts = starts_of(dataset, epoch, blocks)
        offsets.add(min(starts))
        order = [start - min(starts) for start in starts]
        assert sorted(order) == in_order != order
        orders.add(tuple(order))
    assert len(offsets) > 5 and offsets <= set(range(32)) and len(orders) == 10


def test_every_position_of_the_text_is_trained_on_in_time(counted):
    dataset = opened()
    targets = [dataset.batch(index, 8)["targets"] for index in range(400)]
    assert torch.equal(torch.cat(targets).unique(), torch.arange(1, 1003))


def test_the_order_depends_on_seed_and_index_only(counted):
    first, second = opened(), opened()
    second.batch(7, 4)
    assert starts_of(first, 5, 4) == starts_of(second, 5, 4)
    assert starts_of(first, 5, 4) != starts_of(opened(2), 5, 4)


def test_two_small_batches_are_one_big_batch(counted):
    dataset = opened()
    assert starts_of(dataset, 6, 4) + starts_of(dataset, 7, 4) == starts_of(dataset, 3, 8)


@pytest.mark.parametrize("n", [17, 18, 31, 32, 33, 34, 48, 1000])
def test_targets_are_the_tokens_that_follow_also_in_a_text_hardly_longer_than_a_block(counted, n):
    np.arange(n, dtype=np.uint16).tofile(counted / "train.bin")
    write_meta(counted, read_meta(counted)["tokenizer"])
    batch = opened().batch(2, 9)
    assert batch["idx"].shape == (9, 16) and batch["idx"].dtype == torch.int64
    assert torch.equal(batch["targets"], batch["idx"] + 1) and batch["targets"].max() < n


@pytest.mark.parametrize("batch_size", [1, 4, 7, 50])
def test_the_whole_validation_split_is_every_token_but_the_first_once(counted, batch_size):
    batches = list(opened().val_batches(batch_size, None))
    targets = torch.cat([batch["targets"].flatten() for batch in batches])
    assert sorted(targets[targets >= 0].tolist()) == list(range(1, 107))
    assert all(batch["idx"].shape == (batch_size, 16) for batch in batches)


def test_some_evaluation_batches_are_always_the_same_and_spread_over_the_split(counted):
    dataset = opened()
    first = [batch["idx"][:, 0].tolist() for batch in dataset.val_batches(2, 2)]
    dataset.batch(1, 4)
    assert first == [batch["idx"][:, 0].tolist() for batch in opened(9).val_batches(2, 2)]
    assert first[0][0] == 0 and first[0][1] < first[1][0] < first[1][1] and first[1][1] >= 64


def test_the_whole_split_is_the_same_text_for_any_tokenizer_and_a_part_or_other_text_is_not(
    folder,
):
    text = make_text().replace("a", "ä")
    Path("a.txt").write_text(text, encoding="utf-8")
    Path("b.txt").write_text(text[:-2] + "!\n", encoding="utf-8")

    def evaluated(name: str, *keys: str, block_size: int = 16, eval_iters=None) -> dict:
        prepare_data.main([f"--input={name}.txt", f"--name={name}", "--overwrite=True", *keys])
        data = TokenDataset(Path("data", name), block_size, 1)
        return evaluation.evaluated(data, 4, eval_iters)

    whole = evaluated("a", "--tokenizer=char")
    assert whole["val_tokens"] == len(TokenDataset(Path("data/a"), 16, 1).val) - 1
    for keys in (["--tokenizer=byte"], ["--tokenizer=sentencepiece", "--vocab_size=300"]):
        other = evaluated("a", *keys, block_size=7)
        assert other["val_text"] == whole["val_text"]
        assert other["val_tokens"] != whole["val_tokens"]
    assert evaluated("b", "--tokenizer=char")["val_text"] != whole["val_text"]
    part = evaluated("a", "--tokenizer=char", eval_iters=2)
    assert part["val_tokens"] == 2 * 4 * 16 and part["val_text"] != whole["val_text"]


def edit_meta(data: Path, **entries):
    (data / "meta.json").write_text(json.dumps(read_meta(data) | entries))


DAMAGE = {
    "holds token 20, but its tokenizer has only 3": lambda data: edit_meta(
        data, tokenizer={"tokenizer": "char", "alphabet": "abc"}
    ),
    "train.bin has 3,599 tokens, but meta.json says 3,600": lambda data: (data / "train.bin").write_bytes(
        (data / "train.bin").read_bytes()[:-2]
    ),
    "cannot read data/tiny: [Errno 2] No such file or directory: 'data/tiny/val.bin'": lambda data: (
        data / "val.bin"
    ).unlink(),
    "cannot read data/tiny: meta.json is of another version": lambda data: edit_meta(data, format="tokens 99"),
    "cannot read data/tiny: Expecting": lambda data: (data / "meta.json").write_text("{"),
    "cannot read data/tiny: meta.json has 0 bytes for val": lambda data: edit_meta(
        data,
        splits=(splits := read_meta(data)["splits"]) | {"val": splits["val"] | {"bytes": 0}},
    ),
}


@pytest.mark.parametrize("complaint", DAMAGE)
def test_damaged_token_files_are_refused(tiny, fails, complaint):
    DAMAGE[complaint](tiny)
    line = fails(train.main, *TINY_RUN)
    way = "prepare it again with the command in data/tiny/command.txt"
    assert complaint in line and way in line


def test_a_text_shorter_than_a_block_is_refused(tiny, fails):
    line = fails(train.main, *TINY_RUN, "--block_size=4000")
    assert "train.bin has 3,600 tokens but needs at least 4,001" in line


def test_large_files_are_checked_only_when_they_are_prepared_again(tiny, fails, monkeypatch):
    whole = (tiny / "val.bin").read_bytes()
    (tiny / "val.bin").write_bytes((tiny / "val.bin").read_bytes()[::-1])
    damaged = "cannot read data/tiny: the checksum of val.bin does not match meta.json"
    assert damaged in fails(train.main, *TINY_RUN)
    monkeypatch.setattr(datasets, "CHECKED", 799)  # bytes; val.bin has 800
    TokenDataset(tiny, 16, seed=1)
    prepare_data.main(shlex.split((tiny / "command.txt").read_text())[2:])
    assert (tiny / "val.bin").read_bytes() == whole


def test_a_row_that_begins_near_the_end_is_filled_with_zeros(folder):
    np.arange(10, dtype=np.uint32).tofile("train.bin")
    split = {"sha256": sha256(Path("train.bin")), "tokens": 10}
    tokens = TokenFile(Path(), "train", {"dtype": "uint32", "splits": {"train": split}})
    assert len(tokens) == 10
    for length in (1, 4, 10, 12):
        rows = tokens.read(np.arange(10), length)
        assert rows.dtype == np.int64
        expected = np.arange(10)[:, None] + np.arange(length)
        assert rows.tolist() == np.where(expected < 10, expected, 0).tolist()
