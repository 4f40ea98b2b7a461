"""Snapshots for the page: the weights after 0, 10, 30, 100, 300 steps and so on, quantized to 8 bits."""

import torch
from torch import Tensor

from humptygpt import files
from humptygpt.model import count_parameters
from humptygpt.training.run import Run

# {step before which a snapshot is taken, 0, 10, 30, 100, 300 and so on: its file in the run's folder}
SNAPSHOTS = {
    step: f"snapshots/{step}.pt" for step in (0, *(first * 10**zeros for zeros in range(1, 12) for first in (1, 3)))
}
MOST_BYTES = 10e6  # by default, a run saves snapshots if they total fewer bytes than this


def take_snapshot(run: Run) -> None:
    """Save a snapshot if the next step is one of SNAPSHOTS. Of several members, save the first.

    Equal weights give identical files. Raises UserError if the file cannot be written.
    """
    step = run.progress.iter
    if step not in SNAPSHOTS or not run.ranks.first or not keeps_snapshots(run):
        return
    prefix = "members.0." if run.model.config.n_members > 1 else ""
    rows = to_8_bits({k: v for k, v in run.weights().items() if k.startswith(prefix)})
    path = run.folder / SNAPSHOTS[step]
    files.write_whole(path, lambda file: torch.save({"rows": rows}, file))


def keeps_snapshots(run: Run) -> bool:
    """Follow config.snapshots if it is set; otherwise keep snapshots of less than MOST_BYTES in all, unless sharded."""
    if run.config.snapshots is not None:
        return run.config.snapshots
    steps = sum(step < run.config.max_iters for step in SNAPSHOTS)
    size = count_parameters(run.model) / run.model.config.n_members
    return steps * size < MOST_BYTES and not run.ranks.sharded


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
