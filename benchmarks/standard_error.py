"""Whether the ± of a validation loss holds, on ten texts as long as the demo's validation text.

    python -m benchmarks.standard_error

A third of the demo is trained on each half of tiny Shakespeare, with seed 1337, and evaluated on five texts of the
other half. They are its five fifths, or passages of 10,240 characters, dealt to five texts at random a hundred times.
If the ± holds, it is as large as the standard deviation of the texts' losses. So that it is seen what the blocks are
good for, the third column has the standard error of batches as if they were independent. The text is
data/downloads/tiny_shakespeare.txt, as the demo downloads it.
"""

import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from humptygpt.data.dataset import TokenDataset
from humptygpt.formats.load import load
from humptygpt.training.evaluation import standard_error
from humptygpt.training.loggers import read_metrics

TEXTS = 5  # of each half
BATCH = 4  # blocks of 256 characters, as in the demo
PASSAGE = 10  # batches
TRAIN = ["config/shakespeare_char.py", "--max_iters=800", "--dtype=bfloat16"]
TRAIN += ["--threads=1"]


def main() -> None:
    text = Path("data/downloads/tiny_shakespeare.txt").read_text(encoding="utf-8")
    middle = len(text) // 2
    fifths, dealt = [], []
    torch.manual_seed(1)
    for half, order in (("1", text), ("2", text[middle:] + text[:middle])):
        folder = Path(f"out/half_{half}")
        train_on(folder, order)
        losses = batch_losses(folder)
        fifths.append(losses)
        print(f"not half {half}:", *(f"{part.mean():.4f}" for part in losses.chunk(TEXTS)))
        passages = losses[: len(losses) // PASSAGE * PASSAGE].view(-1, PASSAGE)
        for _ in range(100):
            dealt.append(passages[torch.randperm(len(passages))].flatten())
    print("standard deviation of the texts' losses, their ±, the same of single batches")
    for name, halves in (("fifths", fifths), ("dealt passages", dealt)):
        texts = torch.stack([half[: len(half) // TEXTS * TEXTS].view(TEXTS, -1) for half in halves])
        spread = texts.mean(2).var(1).mean().sqrt()
        weights = torch.ones(texts.shape[2])
        errors = [standard_error((text - text.mean()).numpy(), weights.numpy()) for text in texts.flatten(0, 1)]
        single = texts.var(2).mean().sqrt() / texts.shape[2] ** 0.5
        error = torch.tensor(errors).square().mean().sqrt()
        print(f"  {name}: {spread:.4f}, {error:.4f}, {single:.4f}")


def train_on(folder: Path, text: str) -> None:
    """Train on the first half of the text, unless there is such a run. The other half is the validation split."""
    if any(row["kind"] == "end" for row in read_metrics(folder / "metrics.jsonl")):
        return
    Path("out").mkdir(exist_ok=True)
    path = folder.with_suffix(".txt")
    path.write_text(text, encoding="utf-8")
    keys = [f"--input={path}", f"--name={folder.name}", "--val_fraction=0.5"]
    prepare = ["prepare_data.py", *keys, "--tokenizer=char"]
    run = ["train.py", *TRAIN, f"--dataset={folder.name}", f"--out_dir={folder}"]
    for command in (prepare, run):
        subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)


@torch.inference_mode()
def batch_losses(folder: Path) -> torch.Tensor:
    """The loss of each batch of the validation split, (batches,) float64."""
    model = load(folder).model
    dataset = TokenDataset(Path("data") / folder.name, model.config.block_size, seed=1)
    losses = []
    for batch in dataset.val_batches(BATCH, None):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch["idx"])[0]
        targets = batch["targets"].flatten()
        losses.append(F.cross_entropy(logits.flatten(0, 1).double(), targets, ignore_index=-1))
    return torch.stack(losses[:-1])  # the last is shorter


if __name__ == "__main__":
    main()
