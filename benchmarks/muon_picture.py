"""Draw assets/muon.png: the singular values of a gradient, and those of the update that Muon makes of it.

    python train.py config/shakespeare_char.py --max_iters=100 --out_dir=out/muon
    python -m benchmarks.muon_picture out/muon data/shakespeare_char/input.txt

The matrix is the first of the feed-forward network in the second block.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from humptygpt.formats.load import from_checkpoint
from humptygpt.training.optimizers import orthogonalize

BATCH = 4  # pieces of text that the gradient is the mean of, as in a step of the demo


def singular_values(out_dir: str, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the singular values of the gradient and of the update, largest first, as multiples of the largest."""
    path = Path(out_dir) / "best.pt"
    run = from_checkpoint(path)
    size = run.model.config.block_size
    ids = run.tokenizer.encode(Path(text).read_text(encoding="utf-8")[: 2 * BATCH * size])
    ids = torch.from_numpy(ids[: BATCH * size + 1].astype("int64"))
    _, loss = run.model(ids[:-1].view(BATCH, size), ids[1:].view(BATCH, size))
    loss.backward()
    gradient = run.model.stack.blocks[1].mlp.up_proj.weight.grad
    before = torch.linalg.svdvals(gradient)
    return before / before[0], torch.linalg.svdvals(orthogonalize(gradient[None])[0])


def main(out_dir: str, text: str) -> None:
    before, after = singular_values(out_dir, text)
    figure = Figure((8, 4), layout="constrained")
    axes = figure.subplots()
    number = range(1, len(before) + 1)
    axes.semilogy(number, after, ".", color="#0f766e")
    axes.semilogy(number, before, ".", color="#c2410c")
    label = {"xycoords": ("data", "axes fraction"), "fontsize": 11}
    axes.annotate("Muon's update: all directions move alike", (50, 0.78), color="#0f766e", **label)
    axes.annotate(
        "the gradient: a few directions dominate",
        (50, 0.5),
        color="#c2410c",
        **label,
    )
    axes.set(xlabel="singular value, from the largest to the smallest", ylabel="size")
    path = Path(__file__).parent.parent / "assets/muon.png"
    figure.savefig(path, dpi=110)
    print(
        f"{path}: {len(before)} singular values; of the gradient {before[-1]:.5f} to 1, half of them below"
        f" {before.median():.4f}; of the update {after.min():.2f} to {after.max():.2f}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
