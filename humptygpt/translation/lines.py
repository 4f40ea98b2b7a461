"""Lines of text -> their translations, for sample.py."""

from collections.abc import Iterator

import numpy as np
from torch import nn
from tqdm import tqdm

from humptygpt.config import note
from humptygpt.tokenizers import Tokenizer
from humptygpt.translation import beams

AT_ONCE = 500  # lines translated together, before the first is returned


def translate_lines(
    model: nn.Module, tokenizer: Tokenizer, lines: list[str], **search
) -> Iterator[str]:
    """Translate each line; empty lines stay empty. search: keyword arguments for beam_search()."""
    firsts = range(0, len(lines), AT_ONCE)
    for first in tqdm(firsts, unit=f"{AT_ONCE} lines", delay=2, disable=None):
        batch = lines[first : first + AT_ONCE]
        yield from translate_batch(model, tokenizer, batch, first + 1, **search)


def translate_batch(
    model: nn.Module, tokenizer: Tokenizer, lines: list[str], number: int, **search
) -> list[str]:
    """Translate lines together. number: line number of the first, for notes."""
    block_size = model.config.block_size
    # without an encoder, source and translation share the context; the last token of a source is end-of-text
    room = (block_size if model.has_encoder else block_size // 2) - 1
    sources = {}
    for i, ids in enumerate(tokenizer.encode_batch(" ".join(x.split()) for x in lines)):
        if len(ids) > room:
            note(
                f"line {number + i:,} has {len(ids):,} tokens; only the first {room:,} are read"
            )
        if len(ids):
            sources[i] = np.append(ids[:room], tokenizer.eot)
    translations = beams.translate(
        model, list(sources.values()), tokenizer.eot, tokenizer.vocab_size, **search
    )
    texts = [""] * len(lines)
    for i, translation in zip(sources, translations, strict=True):
        # a model may write line breaks
        texts[i] = " ".join(tokenizer.decode(translation.ids).split())
        if not translation.ended:
            note(f"line {number + i:,}: the translation is cut off at the length limit")
    return texts
