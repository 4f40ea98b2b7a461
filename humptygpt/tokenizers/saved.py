"""Tokenizers as meta.json and checkpoints describe them."""

from humptygpt.cli import UserError
from humptygpt.files import refuse_damaged
from humptygpt.tokenizers.basic import TOKENIZERS, Tokenizer


def from_state(state: dict) -> Tokenizer:
    """Make the tokenizer that a meta.json or a checkpoint describes. Raises UserError if it is damaged or unknown."""
    with refuse_damaged("the description of the tokenizer"):
        entries = dict(state)
        name = entries.pop("tokenizer")
        if name in TOKENIZERS:
            return TOKENIZERS[name].from_state(**entries)
        if name == "chat":
            from humptygpt.tokenizers.chat import ChatTokenizer

            base = from_state(entries.pop("base"))
            return ChatTokenizer(base, **entries)
        if name == "tokenizer.json":
            from humptygpt.tokenizers.pretrained import PretrainedTokenizer

            return PretrainedTokenizer.from_state(**entries)
        raise UserError(f"tokenizer {name!r} is not one of: {', '.join(TOKENIZERS)}")
