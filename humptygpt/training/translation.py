"""The translation task: the examples that a run prints, and how translations are scored."""

from sacrebleu.metrics import BLEU, CHRF
from torch import nn

from humptygpt.data.pair_dataset import PairDataset
from humptygpt.generation.translation import translate

NUM_BEAMS = 4  # beam size for the translations that are scored


def translate_examples(model: nn.Module, dataset: PairDataset, count: int = 3) -> str:
    """Translate up to `count` sentences of the validation split greedily. Returns each with its reference, as text."""
    tokenizer = dataset.tokenizer
    stride = len(dataset.pairs["val"]) // count + 1
    sources, references = zip(*dataset.texts("val", stride), strict=True)
    translations = translate(model, tokenizer, sources)
    return "\n".join(
        f"    {tokenizer.decode(source[:-1])}\n  = {reference}\n  > {tokenizer.decode(translation.ids)}"
        for source, reference, translation in zip(sources, references, translations, strict=True)
    )


def score_translations(model: nn.Module, dataset: PairDataset) -> tuple[str, dict[str, float]]:
    """Score translations of the test split, or of the validation split if there is none."""
    split = "test" if "test" in dataset.pairs else "val"
    tokenizer = dataset.tokenizer
    sources, references = zip(*dataset.texts(split), strict=True)
    found = translate(model, tokenizer, sources, num_beams=NUM_BEAMS)
    text, metrics = score([tokenizer.decode(x.ids) for x in found], references)
    title = f"\n{len(sources):,} pairs of the {split} split, beams: {NUM_BEAMS}"
    return title + text, metrics


def score(translations: list[str], references: list[str]) -> tuple[str, dict[str, float]]:
    """Compute BLEU and chrF, both from 0 to 100. sacrebleu's signatures record how they were computed.

    Source: Papineni et al. 2002, "BLEU: a method for automatic evaluation of machine translation"; Popovic 2015, "chrF:
    character n-gram F-score for automatic MT evaluation"; Post 2018, arXiv:1804.08771.
    """
    text = ""
    metrics = {}
    for name, metric in (("BLEU", BLEU()), ("chrF", CHRF())):
        value = metric.corpus_score(translations, [references]).score
        text += f"\n  {name} {value:5.2f}   {metric.get_signature()}"
        metrics[f"test_{name.lower()}"] = value
    return text, metrics
