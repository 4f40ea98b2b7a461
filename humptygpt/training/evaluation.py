"""How good a model is: its validation loss, a sample of its text, and for translation BLEU and chrF."""

import math

import torch
from torch import nn

from humptygpt.core.device import autocast, to_device
from humptygpt.data.batches import Dataset, PairDataset
from humptygpt.generation.beams import NUM_BEAMS, score, translate
from humptygpt.generation.sampling import generate
from humptygpt.parallel.processes import ONE_PROCESS, Processes
from humptygpt.tokenizer.tokenizers import Tokenizer


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
    """Mean loss in nats per token over the evaluation set. Draws no random number, so it cannot disturb training.

    processes: those that divide the batches.
    """
    model.eval()
    total, count = torch.zeros((), device=device), 0
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
    """A validation loss in nats per token, and the same in bits per byte of text and as perplexity."""
    bits = val_loss / math.log(2) / dataset.val_bytes_per_token()
    return {"val_loss": val_loss, "val_bits_per_byte": bits, "val_perplexity": math.exp(val_loss)}


def describe(row: dict[str, float]) -> str:
    """val loss 2.0123 (2.903 bits per byte, perplexity 7.48)"""
    bits, perplexity = row["val_bits_per_byte"], row["val_perplexity"]
    return f"val loss {row['val_loss']:.4f} ({bits:.3f} bits per byte, perplexity {perplexity:.2f})"


def sample_text(
    model: nn.Module, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype
) -> str:
    """300 tokens."""
    model.eval()
    idx = torch.from_numpy(tokenizer.start()).to(device)[None]
    with autocast(device, dtype):
        tokens = list(generate(model, idx, 300, tokenizer.vocab_size, temperature=0.8))
    return tokenizer.decode(torch.cat(tokens).tolist()).strip()


def translate_examples(
    model: nn.Module, dataset: PairDataset, device: torch.device, dtype: torch.dtype
) -> str:
    """Three sentences of the validation split, each with the reference and the model's greedy translation."""
    model.eval()
    tokenizer, examples = dataset.tokenizer, dataset.texts("val", 3)
    with autocast(device, dtype):
        found = translate(
            model, [source for source, _ in examples], tokenizer.eot, tokenizer.vocab_size
        )
    model.train()
    lines = [
        f"    {tokenizer.decode(source[:-1])}\n  = {reference}\n  > {tokenizer.decode(translation.ids)}"
        for (source, reference), translation in zip(examples, found, strict=True)
    ]
    return "\n".join(lines)


def score_translations(
    model: nn.Module, dataset: PairDataset, device: torch.device, dtype: torch.dtype
) -> dict:
    """BLEU and chrF on the test split, or where there is none on the validation split, as from beams.score()."""
    split = "test" if "test" in dataset.pairs else "val"
    tokenizer, pairs = dataset.tokenizer, dataset.texts(split)
    model.eval()
    sources = [source for source, _ in pairs]
    with autocast(device, dtype):
        found = translate(model, sources, tokenizer.eot, tokenizer.vocab_size, num_beams=NUM_BEAMS)
    translations = tokenizer.decode_batch(translation.ids for translation in found)
    return score(translations, [reference for _, reference in pairs]) | {
        "split": split,
        "pairs": len(pairs),
    }


def describe_translations(scores: dict) -> str:
    return (
        f"\n{scores['pairs']:,} pairs of the {scores['split']} split, beams: {NUM_BEAMS}\n"
        f"  BLEU {scores['bleu']:5.2f}   {scores['bleu_signature']}\n"
        f"  chrF {scores['chrf']:5.2f}   {scores['chrf_signature']}"
    )
