"""The translation task: the examples and the score that a run shows."""

from torch import nn

from humptygpt.tasks import Score, Task
from humptygpt.translation.beams import NUM_BEAMS, score, translate
from humptygpt.translation.data import PairDataset


def translate_examples(model: nn.Module, dataset: PairDataset) -> str:
    """Translate three sentences of the validation split greedily, and show each with its reference."""
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
    """Compute BLEU and chrF on the test split, or on the validation split if there is none."""
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


TRANSLATION = Task(
    dataset=PairDataset,
    package="sacrebleu",
    batches_vary=True,
    evaluation_examples=translate_examples,
    score=score_translations,
    sample_label="translate",
    sample_command='python sample.py {} --start="..."',
    card_prompt="Ein Mann schläft.",
    card_note="It translates: given a sentence and the end-of-text token, it writes the translation.",
)
