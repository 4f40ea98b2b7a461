"""Convert sentencepiece models to Hugging Face's tokenizers library. Ids and text stay the same."""

from collections.abc import Iterator
from itertools import pairwise


def convert_sentencepiece(proto: bytes, space: str):
    """Convert another project's tokenizer.model to a tokenizers.Tokenizer. Raises ValueError if no equivalent exists.

    space: which texts get a leading space, if the model adds spaces. "every": each text, as in sentencepiece; "unless":
    each text that does not start with a space; "first": only the first text, unless it starts with a space. The last
    two match transformers' LlamaTokenizer with legacy=True and legacy=False. Special tokens split a text into several.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    model = SentencePieceProcessor(model_proto=proto)
    ids = range(model.vocab_size())
    prefix = model.normalize("a").removesuffix("a")
    plain = model.normalize(" a  ﬁ ") == f"{prefix}▁a▁▁ﬁ▁"
    scores = [model.get_score(i) for i in normal_ids(model)]
    if not plain or not any(map(model.is_byte, ids)) or scores.count(0) > 1:
        raise ValueError(
            "only sentencepiece models with byte_fallback, without normalisation and without user-defined symbols"
            " are supported; convert this one to tokenizer.json with transformers"
        )
    engine = Tokenizer(subword_model(model, "▁"))
    if prefix and space == "every":
        engine.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        scheme = {"first": "first", "unless": "always"}[space] if prefix else "never"
        engine.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    engine.decoder = decoders.Sequence(steps)
    special = [i for i in ids if model.is_control(i) or model.is_unknown(i)]
    engine.add_special_tokens([model.id_to_piece(i) for i in special])
    return engine


def normal_ids(model) -> list[int]:
    """Ids of the pieces that sentencepiece learned. model: a SentencePieceProcessor."""
    others = (model.is_byte, model.is_control, model.is_unknown)
    return [i for i in range(model.vocab_size()) if not any(kind(i) for kind in others)]


def subword_model(model, space: str, first: int = 0):
    """Build a model for the tokenizers library from the tokens of a SentencePieceProcessor, starting at id `first`.

    space: the character that stands for a space in the text of a token. The scores of byte pairs are 0, -1, -2, ...;
    the pair with the highest score is merged first. The scores of unigram models are log-probabilities.
    """
    from tokenizers import models

    ids = range(first, model.vocab_size())
    texts = {i: model.id_to_piece(i).replace("▁", space) for i in ids}
    scores = {i: model.get_score(i) for i in ids}
    if not all(score.is_integer() for score in scores.values()):
        # unk_id marks text without a piece until it is spelled in bytes; any token will do
        pieces = [(texts[i], scores[i]) for i in ids]
        return models.Unigram(pieces, unk_id=0, byte_fallback=True)
    by_score = sorted(normal_ids(model), key=scores.get, reverse=True)
    merges = list(find_merges([texts[i] for i in by_score]))
    vocabulary = {text: i - first for i, text in texts.items()}
    return models.BPE(vocabulary, merges, byte_fallback=True)


def find_merges(pieces: list[str]) -> Iterator[tuple[str, ...]]:
    """Find the pair that each piece of two or more characters is merged from. Pairs are in the order of the pieces.

    tiktoken and sentencepiece merge any neighbours whose combined text is a piece, the earliest piece first. By the
    time it is a piece's turn, all earlier merges are done, so its text is always split into the same pair, which is
    found here. A piece whose text is still split into more than two parts is never merged, and is left out.
    """
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    for rank, piece in enumerate(pieces):
        parts = list(piece)
        while len(parts) > 2:
            pair_ranks = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            first = min(pair_ranks)
            if first >= rank:
                break
            at = pair_ranks.index(first)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield tuple(parts)
