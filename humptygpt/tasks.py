"""What a task means to data, training, evaluation, sampling and export: one entry of TASKS.

A data set and a checkpoint name their task, and each class of MODELS those that it can learn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from humptygpt.data import Dataset, PairDataset, TokenDataset
from humptygpt.sampling import generate
from humptygpt.translation.beams import NUM_BEAMS, score, translate

SAMPLE_TOKENS = 300  # of the text at the end of a run
LINE_TOKENS = 60  # of the line after each evaluation
Show = Callable[[nn.Module, Dataset], str]


class Score(NamedTuple):
    text: str  # for the user
    metrics: dict[str, float]  # for metrics.jsonl


@dataclass(frozen=True)
class Task:
    """What differs from task to task. Each model is on its device and in evaluation mode, within autocast."""

    dataset: type[Dataset]
    package: str | None  # that the score needs
    batches_vary: bool  # in their shapes
    evaluation_examples: Show | None  # after each evaluation
    final_examples: Show | None  # at the end of a run
    # at the end of a run, and of eval_only
    score: Callable[[nn.Module, Dataset], Score] | None
    continues_text: (
        bool  # sample.py continues a prompt; otherwise it translates line by line
    )
    sample_label: str  # of what to do next
    sample_command: str  # {} is the argument that names the run
    card_prompt: str  # in a model card's example
    card_note: str  # in a model card


def sample(model: nn.Module, dataset: TokenDataset, max_new_tokens: int) -> str:
    """Generate a text from nothing."""
    tokenizer = dataset.tokenizer
    idx = torch.from_numpy(tokenizer.start()).to(next(model.parameters()).device)[None]
    tokens = list(
        generate(model, idx, max_new_tokens, tokenizer.vocab_size, temperature=0.8)
    )
    return tokenizer.decode(torch.cat(tokens).tolist()).strip()


def sample_line(model: nn.Module, dataset: TokenDataset) -> str:
    line = " ".join(sample(model, dataset, LINE_TOKENS).split())
    return f"  > {line[:100]}"


def sample_text(model: nn.Module, dataset: TokenDataset) -> str:
    return f"\n{sample(model, dataset, SAMPLE_TOKENS)}\n"


def translate_examples(model: nn.Module, dataset: PairDataset) -> str:
    """Translate three sentences of the validation split greedily, each shown with its reference."""
    tokenizer = dataset.tokenizer
    examples = dataset.texts("val", 3)
    sources = [source for source, _ in examples]
    translations = translate(model, sources, tokenizer.eot, tokenizer.vocab_size)
    lines = []
    for (source, reference), translation in zip(examples, translations, strict=True):
        lines += [
            f"    {tokenizer.decode(source[:-1])}",
            f"  = {reference}",
            f"  > {tokenizer.decode(translation.ids)}",
        ]
    return "\n".join(lines)


def score_translations(model: nn.Module, dataset: PairDataset) -> Score:
    """Compute BLEU and chrF on the test split, or where there is none on the validation split."""
    split = "test" if "test" in dataset.pairs else "val"
    tokenizer = dataset.tokenizer
    pairs = dataset.texts(split)
    sources = [source for source, _ in pairs]
    references = [reference for _, reference in pairs]
    beams = translate(
        model, sources, tokenizer.eot, tokenizer.vocab_size, num_beams=NUM_BEAMS
    )
    scores = score([tokenizer.decode(beam.ids) for beam in beams], references)
    text = (
        f"\n{len(pairs):,} pairs of the {split} split, beams: {NUM_BEAMS}\n"
        f"  BLEU {scores['bleu']:5.2f}   {scores['bleu_signature']}\n"
        f"  chrF {scores['chrf']:5.2f}   {scores['chrf_signature']}"
    )
    return Score(text, {"test_bleu": scores["bleu"], "test_chrf": scores["chrf"]})


TASKS = {
    "language modelling": Task(
        dataset=TokenDataset,
        package=None,
        batches_vary=False,
        evaluation_examples=sample_line,
        final_examples=sample_text,
        score=None,
        continues_text=True,
        sample_label="more of this",
        sample_command="python sample.py {}",
        card_prompt="",
        card_note="",
    ),
    "translation": Task(
        dataset=PairDataset,
        package="sacrebleu",
        batches_vary=True,
        evaluation_examples=translate_examples,
        final_examples=None,
        score=score_translations,
        continues_text=False,
        sample_label="translate",
        sample_command='python sample.py {} --start="..."',
        card_prompt="Ein Mann schläft.",
        card_note="It translates: after a sentence and the end-of-text token, it writes the translation.",
    ),
}
