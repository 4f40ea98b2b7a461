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
    scores = [model.get_score(i) for i in normal_ids(model)]
    if not plain or not any(map(model.is_byte, ids)) or scores.count(0) > 1:
        raise ValueError(
            "only sentencepiece models like Llama's are supported: with byte_fallback and a space before the text,"
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


def normal_ids(model: "SentencePieceProcessor") -> list[int]:
    """List the ids of the pieces that sentencepiece learned."""
    others = (model.is_byte, model.is_control, model.is_unknown)
    return [i for i in range(model.vocab_size()) if not any(kind(i) for kind in others)]


def subword_model(model: "SentencePieceProcessor", space: str, first: int = 0) -> "Model":
    """Build a model for the tokenizers library from the pieces of a sentencepiece model.

    The two model types are told apart by their scores. In a BPE model these are 0, -1, -2, and so on, and the pair with
    the highest score is merged first. In a unigram model they are log-probabilities.

    space: the character that stands for a space in pieces. first: the first id to use; the new ids start at 0.
    """
    from tokenizers import models

    ids = range(first, model.vocab_size())
    pieces = [(model.id_to_piece(i).replace("▁", space), model.get_score(i)) for i in ids]
    if not all(score.is_integer() for _, score in pieces):
        # unk_id is required, but any id will do, because text that matches no piece is spelled in bytes
        return models.Unigram(pieces, unk_id=0, byte_fallback=True)
    by_score = sorted(normal_ids(model), key=model.get_score, reverse=True)
    merges = find_merges([pieces[i - first][0] for i in by_score])
    vocabulary = {text: i for i, (text, _) in enumerate(pieces)}
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
