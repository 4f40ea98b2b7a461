"""How good a model is: its validation loss, in nats per token, in bits per byte, and as perplexity."""

import math

import torch

from humptygpt.data.batches import Dataset
from humptygpt.nn.layers import autocast, to_device


@torch.no_grad()
def evaluate(run) -> float:
    """Compute the mean loss in nats per token over the evaluation set; ranks divide its batches. run: a train.Run.

    Draws no random number, so it cannot disturb training.
    """
    processes = run.processes
    batches = run.dataset.val_batches(run.config.batch_size, run.config.eval_iters)
    run.net.eval()
    total = torch.zeros((), device=run.device)
    count = 0
    for batch in processes.alternate(batches):
        tokens = int((batch["targets"] >= 0).sum())
        with autocast(run.device, run.dtype):
            _, loss = run.net(**to_device(batch, run.device))
        if tokens:
            total += loss * tokens
            count += tokens
    run.net.train()
    return processes.sum(float(total)) / processes.sum(count)


def measures(val_loss: float, dataset: Dataset) -> dict[str, float]:
    """Return a validation loss in nats per token, and the same in bits per byte of text and as perplexity."""
    bits = val_loss / math.log(2) / dataset.val_bytes_per_token()
    return {
        "val_loss": val_loss,
        "val_bits_per_byte": bits,
        "val_perplexity": math.exp(val_loss),
    }


def evaluation_line(row: dict[str, float]) -> str:
    """Return: val loss 2.0123 (2.903 bits per byte, perplexity 7.48)"""
    bits, perplexity = row["val_bits_per_byte"], row["val_perplexity"]
    return f"val loss {row['val_loss']:.4f} ({bits:.3f} bits per byte, perplexity {perplexity:.2f})"
