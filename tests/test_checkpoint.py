import errno
import io
import pickle
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN

import sample
import train
from humptygpt import checkpoint, files
from humptygpt.configurator import UserError


def test_a_checkpoint_comes_back_as_it_was(folder):
    state = {"iter": 3, "model": {"w": torch.arange(4.0)}, "text": "ü", "best": float("inf"), "losses": [1.5]}
    checkpoint.save(Path("a.pt"), state)
    again = checkpoint.load(Path("a.pt"))
    assert torch.equal(again.pop("model")["w"], torch.arange(4.0))
    assert again == {"format": checkpoint.FORMAT, "iter": 3, "text": "ü", "best": float("inf"), "losses": [1.5]}


class FullDisk(io.RawIOBase):
    """A file that takes some bytes and then has no more room."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def writable(self):
        return True

    def write(self, data):
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(data)
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 100, 1000])
def test_a_full_disk_while_saving_leaves_the_checkpoint_before(folder, room):
    path = Path("a.pt")
    checkpoint.save(path, {"iter": 1, "w": torch.zeros(1000)})
    state = {"format": checkpoint.FORMAT, "iter": 2, "w": torch.zeros(1000)}
    with pytest.raises(UserError, match=r"cannot write a\.pt: .*; the one before it is as it was"):
        files.write_whole(path, lambda file: torch.save(state, FullDisk(file, room)))
    assert checkpoint.load(path)["iter"] == 1
    assert [file.name for file in Path().iterdir()] == ["a.pt"]


def test_a_full_disk_in_training_is_one_line(tiny, fails, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    assert "cannot write out/run/best.pt: No space left on device" in fails(train.main, *TINY_RUN)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def malicious(path: Path):
    torch.save({"format": checkpoint.FORMAT, "model": Evil()}, path)


def malicious_without_zip(path: Path):
    path.write_bytes(pickle.dumps({"format": checkpoint.FORMAT, "model": Evil()}))


def truncated(path: Path):
    checkpoint.save(path, {"w": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:-500])


BAD = {
    "out/run/best.pt is not a checkpoint: it is truncated, damaged or holds": [
        malicious,
        malicious_without_zip,
        truncated,
        lambda path: path.write_bytes(b"no zip at all"),
        lambda path: path.write_bytes(b""),
    ],
    "out/run/best.pt is not a checkpoint of this version": [
        lambda path: torch.save({"model": {}, "model_args": {}}, path),
        lambda path: torch.save([1, 2], path),
    ],
    "no checkpoint out/run/best.pt; train first": [lambda path: None],
    "cannot read out/run/best.pt: Is a directory": [lambda path: path.mkdir()],
}


@pytest.mark.parametrize(("complaint", "make"), [(line, make) for line, makes in BAD.items() for make in makes])
def test_what_is_no_checkpoint_is_refused_and_never_runs(folder, fails, complaint, make):
    Path("out/run").mkdir(parents=True)
    make(Path("out/run/best.pt"))
    assert complaint in fails(sample.main, "--out_dir=out/run", "--device=cpu")
    assert not Path("ran").exists()


def test_resuming_without_a_checkpoint_is_refused(tiny, fails):
    assert "no checkpoint out/run/ckpt.pt" in fails(train.main, *TINY_RUN, "--init_from=resume")
    assert not Path("out").exists()
