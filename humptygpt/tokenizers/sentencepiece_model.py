"""The merges of a sentencepiece model of ours, for Hugging Face's tokenizers library and for a page."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers.models import Model


def merge_scores(model: "SentencePieceProcessor") -> dict[int, float]:
    """Return the score of each piece that sentencepiece learned, by id. The pair with the highest is merged first."""
    others = (model.is_byte, model.is_control, model.is_unknown)
    ids = [i for i in range(model.vocab_size()) if not any(kind(i) for kind in others)]
    return {i: model.get_score(i) for i in ids}


def subword_model(model: "SentencePieceProcessor", space: str, first: int = 0) -> "Model":
    """Build a BPE model for the tokenizers library from the pieces of a sentencepiece model.

    space: the character that stands for a space in pieces. first: the first id to use; the new ids start at 0.
    """
    from tokenizers import models

    ids = range(first, model.vocab_size())
    pieces = [model.id_to_piece(i).replace("▁", space) for i in ids]
    scores = merge_scores(model)
    merges = find_merges([pieces[i - first] for i in sorted(scores, key=scores.get, reverse=True)])
    vocabulary = {text: i for i, text in enumerate(pieces)}
    return models.BPE(vocabulary, merges, byte_fallback=True)


def find_merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Find all pairs of pieces that together form another piece. They are in the order of the pieces that they form.

    tiktoken and sentencepiece store no such list: they merge any two neighbours whose combined text is a piece, and the
    piece that comes first in the vocabulary is formed first.
    """
    known = set(pieces)
    return [
        (piece[:at], piece[at:])
        for piece in pieces
        for at in range(1, len(piece))
        if piece[:at] in known and piece[at:] in known
    ]
