"""Convert sentencepiece models for Hugging Face's tokenizers library. Ids and text stay the same."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer
    from tokenizers.models import Model


def convert_sentencepiece(
    proto: bytes, scheme: str | None
) -> tuple["Tokenizer", dict[str, str]]:
    """Convert another project's tokenizer.model to a tokenizers.Tokenizer. Raises ValueError if no equivalent exists.

    Returns the tokenizer, and the tokens that begin and end a text, under their names in tokenizer_config.json.

    scheme: which parts of a text get a leading space, if special tokens split it into parts. None: every part, as in
    sentencepiece. "always": every part that does not start with a space, as in transformers' LlamaTokenizer with
    legacy=True. "first": only the first part, unless it starts with a space, as with legacy=False.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    model = SentencePieceProcessor(model_proto=proto)
    ids = range(model.vocab_size())
    plain = model.normalize(" a  ﬁ ") == "▁▁a▁▁ﬁ▁"
    scores = [*merge_scores(model).values()]
    # a user-defined symbol has the score 0, and the scores of a unigram model are log-probabilities
    merges = all(map(float.is_integer, scores)) and scores.count(0) < 2
    if not (plain and merges and any(map(model.is_byte, ids))):
        raise ValueError(
            "only sentencepiece models like Llama's are supported: BPE with byte_fallback and a space before the text,"
            " and without normalisation or user-defined symbols; use transformers to convert this to tokenizer.json"
        )
    engine = Tokenizer(subword_model(model, "▁"))
    if scheme:
        engine.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    else:
        engine.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    engine.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    for i in ids:
        if model.is_control(i) or model.is_unknown(i):
            engine.add_special_tokens([model.id_to_piece(i)])
    ends = {"bos_token": model.bos_id(), "eos_token": model.eos_id()}
    return engine, {key: model.id_to_piece(i) for key, i in ends.items() if i >= 0}


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
    merges = find_merges(
        [pieces[i - first] for i in sorted(scores, key=scores.get, reverse=True)]
    )
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
