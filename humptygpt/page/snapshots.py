"""Snapshots of a run: its weights after 0, 10, 30, 100, 300 steps and so on, quantized to 8 bits per weight."""

from collections.abc import Callable

import torch
from torch import Tensor

from humptygpt.files import write_whole
from model import count_parameters

STEPS = (0, *(first * 10**zeros for zeros in range(1, 12) for first in (1, 3)))
SMALL = 10e6  # by default, a run saves snapshots if they total fewer bytes than this
FILES = {step: f"snapshots/{step}.pt" for step in STEPS}  # paths in the run's folder


def taker(run, folder) -> Callable[[int], None]:
    """Return a function that is called before each step, and saves a snapshot if the step is one of STEPS.

    With config.snapshots=False it saves none, and with None only if they total less than SMALL and the model is not
    sharded. Of several members, it saves the first. Equal weights give identical files. The function raises UserError
    if it cannot write.

    run: a train.Run. folder: its RunFolder.
    """
    keep = run.config.snapshots
    if keep is None:
        steps = sum(step < run.config.max_iters for step in STEPS)
        size = count_parameters(run.model) / run.model.config.n_members
        keep = steps * size < SMALL and not run.process.sharded
    prefix = "members.0." if run.model.config.n_members > 1 else ""

    def take(step: int) -> None:
        if keep and step in FILES and run.process.first:
            weights = {k: v for k, v in run.weights().items() if k.startswith(prefix)}
            rows = {"rows": to_8_bits(weights)}
            write_whole(folder.path / FILES[step], lambda file: torch.save(rows, file))

    return take


def to_8_bits(state: dict[str, Tensor]) -> Tensor:
    """Quantize each row to 8 bits: a float32 scale (4 bytes), then its weights as integer multiples of the scale.

    The multiples are from -127 to 127. A row is one row of a matrix, or a whole vector. Rows are in the order of the
    state dict. Tied matrices are packed once. Returns (bytes,) int8.
    """
    packed = []
    for p in {p.data_ptr(): p for p in state.values()}.values():
        rows = p.cpu().view(-1, p.shape[-1:].numel())  # a scalar is a row of length 1
        scale = rows.abs().amax(1, keepdim=True) / 127
        rounded = (rows / scale).nan_to_num().round()  # a row of zeros gives 0 / 0
        packed.append(torch.hstack([scale.view(torch.int8), rounded.char()]).flatten())
    return torch.cat(packed)
