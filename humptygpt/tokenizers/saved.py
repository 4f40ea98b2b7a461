"""Tokenizers as meta.json and checkpoints describe them."""

import pkgutil

from humptygpt.cli import UserError
from humptygpt.files import refuse_damaged
from humptygpt.tokenizers.basic import TOKENIZERS, Tokenizer

OTHERS = {  # {name: "module:class"}; a module is imported when a description names its class
    "chat": "humptygpt.tokenizers.chat:ChatTokenizer",
    "tokenizer.json": "humptygpt.tokenizers.pretrained:PretrainedTokenizer",
}


def from_state(state: dict) -> Tokenizer:
    """Make the tokenizer that a meta.json or a checkpoint describes. Raises UserError if it is damaged or unknown."""
    with refuse_damaged("the description of the tokenizer"):
        entries = dict(state)
        name = entries.pop("tokenizer")
        if "base" in entries:  # the tokenizer of the text in conversations
            entries["base"] = from_state(entries["base"])
        known = TOKENIZERS | OTHERS
        if name not in known:
            raise UserError(f"tokenizer {name!r} is not one of: {', '.join(known)}")
        cls = TOKENIZERS.get(name) or pkgutil.resolve_name(OTHERS[name])
        return cls.from_state(**entries)
