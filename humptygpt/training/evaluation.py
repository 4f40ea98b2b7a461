"""How good a model is: its validation loss, in nats per token, in bits per byte, and as perplexity."""

import math

import torch
from torch import nn

from humptygpt.core.device import autocast, to_device
from humptygpt.data.batches import Dataset
from humptygpt.parallel.processes import ONE_PROCESS, Processes


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int,
    eval_iters: int | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes = ONE_PROCESS,
) -> float:
    """Compute the mean loss in nats per token over the evaluation set. Draws no random number, to not disturb training.

    processes: those that divide the batches.
    """
    model.eval()
    total = torch.zeros((), device=device)
    count = 0
    for batch in processes.alternate(dataset.val_batches(batch_size, eval_iters)):
        tokens = int((batch["targets"] >= 0).sum())
        with autocast(device, dtype):
            _, loss = model(**to_device(batch, device))
        if tokens:
            total += loss * tokens
            count += tokens
    model.train()
    return processes.sum(float(total)) / processes.sum(count)


def measures(val_loss: float, dataset: Dataset) -> dict[str, float]:
    """Return a validation loss in nats per token, and the same in bits per byte of text and as perplexity."""
    bits = val_loss / math.log(2) / dataset.val_bytes_per_token()
    return {"val_loss": val_loss, "val_bits_per_byte": bits, "val_perplexity": math.exp(val_loss)}


def evaluation_line(row: dict[str, float]) -> str:
    """Return: val loss 2.0123 (2.903 bits per byte, perplexity 7.48)"""
    bits, perplexity = row["val_bits_per_byte"], row["val_perplexity"]
    return f"val loss {row['val_loss']:.4f} ({bits:.3f} bits per byte, perplexity {perplexity:.2f})"
