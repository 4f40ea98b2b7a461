"""nanoGPT's protocol: the validation loss on random crops of tiny Shakespeare, without the code of our trainer.

    python -m benchmarks.random_crops out/shakespeare_char 16

This draws 200 batches of 16 crops. The text is data/downloads/tiny_shakespeare.txt, as the demo downloads it.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from humptygpt.formats.load import load

BATCHES = 200


def crops_loss(source: Path, batch_size: int) -> float:
    """Mean cross-entropy per token over random crops of block_size tokens from the validation split."""
    loaded = load(source)
    text = Path("data/downloads/tiny_shakespeare.txt").read_text(encoding="utf-8")
    val = torch.from_numpy(loaded.tokenizer.encode(text[int(0.9 * len(text)) :]))
    T = loaded.model.config.block_size
    torch.manual_seed(1)
    losses = []
    with torch.no_grad():
        for _ in range(BATCHES):
            starts = torch.randint(len(val) - T, (batch_size,))
            x, y = (torch.stack([val[i + k : i + k + T] for i in starts]) for k in (0, 1))
            logits = loaded.model(x)[0]
            losses.append(F.cross_entropy(logits.flatten(0, 1), y.flatten()).item())
    return sum(losses) / len(losses)


if __name__ == "__main__":
    print(crops_loss(Path(sys.argv[1]), int(sys.argv[2])))
