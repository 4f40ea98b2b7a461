"""Snapshots: the weights of a run after steps 0, 10, 30, ..., in 8 bits a weight."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_model
import torch
from conftest import assert_same_weights
from humptygpt.model import ModelConfig, count_parameters

import train
from humptygpt.cli import UserError
from humptygpt.formats import checkpoint
from humptygpt.formats.load import load
from humptygpt.models.build import build
from humptygpt.page import page_data
from humptygpt.page.snapshots import take_snapshot, to_8_bits
from humptygpt.training.ranks import Ranks
from humptygpt.training.run import Progress
from humptygpt.training.settings import TrainConfig

OUT = Path("out/run")


def kept(out_dir: Path = OUT) -> dict[int, bytes]:
    """The bytes of each snapshot, by its step."""
    paths = (out_dir / "snapshots").glob("*.pt")
    return {int(path.stem): path.read_bytes() for path in sorted(paths, key=steps_of)}


def steps_of(path: Path) -> int:
    return int(path.stem)


def restored(packed: torch.Tensor, like: torch.nn.Module) -> torch.nn.Module:
    """A model with the weights of a snapshot, each row times its scale."""
    model = build(like.config)
    with torch.no_grad():
        for p in model.parameters():
            size = p.numel() // p.shape[-1] * (4 + p.shape[-1])
            rows = packed[:size].view(-1, 4 + p.shape[-1])
            packed = packed[size:]
            scale = rows[:, :4].contiguous().view(torch.float32)
            p.copy_((rows[:, 4:] * scale).view(p.shape))
    assert not len(packed)
    return model.eval()


def test_a_small_run_keeps_the_weights_of_steps_0_10_30_and_so_on(run_train):
    run_train("--max_iters=101", "--eval_interval=30", "--init=zero")
    assert list(kept()) == [0, 10, 30, 100]
    model = load(OUT / "ckpt.pt").model
    first = restored(checkpoint.read_plain(OUT / "snapshots" / "0.pt")["rows"], model)
    torch.manual_seed(1337)
    for p, q in zip(build(model.config).parameters(), first.parameters(), strict=True):
        step = p.detach().view(-1, p.shape[-1]).abs().amax(dim=1) / 127
        difference = (p - q).view(-1, p.shape[-1]).abs().amax(dim=1)
        assert (difference <= 0.501 * step).all()


def test_without_being_asked_a_run_keeps_less_than_10_megabytes():
    with torch.device("meta"):
        model = build(ModelConfig(n_layer=8, block_size=64, vocab_size=65))
    assert count_parameters(model) == 1_591_552

    def keeps(**settings) -> bool:
        weights = lambda: {"weight": torch.ones(1)}  # noqa: E731
        run = SimpleNamespace(
            model=model,
            config=TrainConfig(**settings),
            folder=Path("kept"),
            ranks=Ranks(None),
            progress=Progress(iter=10),
            weights=weights,
        )
        take_snapshot(run)
        kept = Path("kept/snapshots/10.pt").exists()
        shutil.rmtree("kept", ignore_errors=True)
        return kept

    assert keeps(max_iters=3000)  # 6
    assert not keeps(max_iters=3001)  # 7
    assert keeps(max_iters=3001, snapshots=True)
    assert not keeps(max_iters=3000, snapshots=False)


def test_snapshots_change_nothing_in_a_run(run_train):
    rows = run_train("--max_iters=12", "--dropout=0.1", "--snapshots=False")
    whole = checkpoint.read(OUT / "ckpt.pt")["model"]
    assert run_train("--max_iters=12", "--dropout=0.1") == rows
    assert_same_weights(checkpoint.read(OUT / "ckpt.pt")["model"], whole)


def test_a_resumed_run_has_the_same_snapshots_byte_for_byte(run_train):
    run_train("--max_iters=31", "--eval_interval=6", "--lr_decay_iters=31")
    whole = kept()
    run_train("--max_iters=10", "--eval_interval=6", "--lr_decay_iters=31")
    assert list(kept()) == [0]
    # files of steps that the resumed run has not done, and half a file, as after a kill; and a file of the user's
    for name in ("30.pt", "100.pt", "300.pt.0123abcd.tmp", "my copy.pt"):
        (OUT / "snapshots" / name).write_bytes(b"of another future")
    train.main(["--init_from=resume", "--out_dir=out/run", "--max_iters=31"])
    (OUT / "snapshots/my copy.pt").unlink()
    assert kept() == whole and list(whole) == [0, 10, 30]
    assert not list(OUT.rglob("*.tmp"))


@pytest.mark.parametrize("keys", [{}, {"tie_weights": False, "bias": True}], ids=str)
def test_a_snapshot_has_each_matrix_once_in_the_order_of_the_state_dict(keys):
    packed = to_8_bits(test_model.tiny(**keys).state_dict())
    again = restored(packed, test_model.tiny(**keys)).state_dict()
    assert torch.equal(packed, to_8_bits(again))


def test_a_damaged_snapshot_or_one_of_another_model_is_refused(run_train):
    run_train()
    model = load(OUT / "ckpt.pt").model
    path = OUT / "snapshots" / "0.pt"
    whole = path.read_bytes()
    (found,) = page_data.snapshot_data(OUT, 6, model)
    assert found["iter"] == 0
    with pytest.raises(UserError, match=r"0\.pt: it is not a snapshot of this model"):
        page_data.snapshot_data(OUT, 6, test_model.tiny())
    path.write_bytes(whole[:1000])
    with pytest.raises(UserError, match=r"0\.pt: it is truncated or damaged"):
        page_data.snapshot_data(OUT, 6, model)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match=r"0\.pt: it is not a snapshot"):
        page_data.snapshot_data(OUT, 6, model)
