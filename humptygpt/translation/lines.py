"""Translate lines of text, for sample.py."""

from collections.abc import Iterator

import numpy as np
from torch import nn
from tqdm import tqdm

from humptygpt.cli import note
from humptygpt.tokenizers import Tokenizer
from humptygpt.translation import beams

AT_ONCE = 500  # lines translated together; none is returned before all are done


def translate_lines(
    model: nn.Module, tokenizer: Tokenizer, lines: list[str], **search: object
) -> Iterator[str]:
    """Translate each line; empty lines stay empty. search: keyword arguments for beam_search()."""
    block_size = model.config.block_size
    # without an encoder, source and translation share the context; the last token of a source is end-of-text
    room = (block_size if hasattr(model, "encode") else block_size // 2) - 1
    firsts = range(0, len(lines), AT_ONCE)
    for first in tqdm(firsts, unit=f"{AT_ONCE} lines", delay=2, disable=None):
        batch = lines[first : first + AT_ONCE]
        sources = [tokenizer.encode(" ".join(line.split())) for line in batch]
        for number, ids in enumerate(sources, start=first + 1):
            if len(ids) > room:
                note(
                    f"line {number:,} has {len(ids):,} tokens; only the first {room:,} are read"
                )
        cut = [np.append(ids[:room], tokenizer.eot) for ids in sources if len(ids)]
        translations = iter(beams.translate(model, tokenizer, cut, **search))
        for number, ids in enumerate(sources, start=first + 1):
            if not len(ids):
                yield ""
                continue
            translation = next(translations)
            if not translation.ended:
                note(f"line {number:,}: the translation was cut off at the length limit")
            # a model may generate line breaks, but a translation must be one line
            yield " ".join(tokenizer.decode(translation.ids).split())
