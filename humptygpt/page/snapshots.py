"""Snapshots of a run: what its weights were after steps 0, 10, 30, 100, 300 and so on, in 8 bits a weight."""

import base64
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from humptygpt import checkpoint
from humptygpt.files import write_whole
from model import count_parameters

STEPS = (0, *(first * 10**zeros for zeros in range(1, 12) for first in (1, 3)))
SMALL = 10e6  # bytes of snapshots that a run keeps without being asked
FILES = {step: f"snapshots/{step}.pt" for step in STEPS}  # in the run's folder


def taker(run, folder) -> Callable[[int], None]:
    """Return a function that keeps the weights of a train.Run in its RunFolder before a step, if it is one of STEPS.

    It does nothing unless config.snapshots is set or, left open, all snapshots together are below SMALL.
    """
    config = run.config
    keep = config.snapshots
    if keep is None:
        steps = sum(step < config.max_iters for step in STEPS)
        keep = steps * count_parameters(run.model) < SMALL and not run.process.sharded

    def take(step: int) -> None:
        if keep and step in FILES and run.process.first:
            save(folder.path / FILES[step], run.weights())

    return take


def save(path: Path, state: dict[str, Tensor]) -> None:
    """Write a snapshot of a state dict, the same bytes for the same weights. Raises UserError."""
    rows = {"rows": to_8_bits(state)}
    write_whole(path, lambda file: torch.save(rows, file))


def to_8_bits(state: dict[str, Tensor]) -> Tensor:
    """Return for each row a scale, float32 in 4 bytes, and its weights as multiples of it, -127 to 127: (bytes) int8.

    A row is one of a matrix, or a vector. They are in the order of the state dict, tied ones once.
    """
    packed = []
    for p in {p.data_ptr(): p for p in state.values()}.values():
        rows = p.cpu().view(-1, p.shape[-1:].numel())  # a number is a row, too
        scale = rows.abs().amax(1, keepdim=True) / 127
        rounded = (rows / scale).nan_to_num().round()  # 0 / 0 in a row of zeros
        packed.append(torch.hstack([scale.view(torch.int8), rounded.char()]).flatten())
    return torch.cat(packed)


def snapshot_data(folder: Path, end: int, model: nn.Module) -> list[dict]:
    """Return the snapshots before step `end` of the model's run, as makeSnapshot() in explain/data.js takes them.

    Raises UserError where a file is damaged, or of another model.
    """
    like = {"rows": to_8_bits(model.state_dict())}
    data = []
    for step, name in FILES.items():
        path = folder / name
        if step < end and path.exists():
            saved = checkpoint.read_plain(path)
            with checkpoint.refuse_damaged(path, "is no snapshot of this model"):
                checkpoint.check_tensors("", saved, like, "cpu")
            packed = base64.b64encode(saved["rows"].numpy().tobytes())
            data.append({"iter": step, "rows": packed.decode()})
    return data
