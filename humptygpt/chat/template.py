"""Another project's chat template, for models that come with one: a program in Jinja that writes a conversation.

It runs in Jinja's sandbox, as in transformers, so that it can do nothing but make text.
"""

import json
import time
from collections.abc import Iterable
from functools import partial
from typing import ClassVar

import numpy as np
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from humptygpt.chat.tokens import Turn
from humptygpt.cli import UserError, one_line, refuse
from humptygpt.convert.pretrained import PretrainedTokenizer
from humptygpt.convert.read_huggingface import read_settings
from humptygpt.files import parse_json
from humptygpt.loading import Loaded

# A noncharacter, which no text needs. It separates the characters of special tokens that somebody types from each
# other, and they are encoded one by one, so that only those of the template itself are recognised.
SIGN = "\ufdd0"
GENERATION = {"eos_token_id?": (int, [int], None)}


def with_template(loaded: Loaded) -> Loaded:
    """Let a model whose folder has a chat template talk. Any other model stays as it is."""
    template = loaded.path / "chat_template.jinja"
    generation = loaded.path / "generation_config.json"
    with refuse(f"cannot read the chat template in {loaded.path}: "):
        settings = read_settings(loaded.path)
        if template.is_file():
            settings["chat_template"] = template.read_text(encoding="utf-8")
        if generation.is_file():
            settings |= parse_json(generation.read_bytes(), GENERATION)
    if not settings.get("chat_template"):
        return loaded
    tokenizer = TemplateTokenizer(loaded.tokenizer, settings)
    return loaded._replace(tokenizer=tokenizer, task="chat")


class Generation(Extension):
    """The tag {% generation %} around what the model writes; it has no effect on the text."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateTokenizer(PretrainedTokenizer):
    """A tokenizer that encodes conversations as a chat template writes them. Everything else it shares with its base.

    settings: tokenizer_config.json and generation_config.json. They have the template, the texts of special tokens for
    it, and the tokens that end a reply. Raises UserError if the template cannot write a short conversation.
    """

    def __init__(self, base: PretrainedTokenizer, settings: dict):
        vars(self).update(vars(base))
        self.settings = settings
        ends = settings.get("eos_token_id")
        self.ends = ends if isinstance(ends, list) else [ends]
        self.environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
        )
        # Jinja's own is for HTML
        self.environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        self.environment.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": time.strftime,
        }
        self.encode_turns([Turn("user", "Hi")], reply=True)

    def encode_turns(self, turns: Iterable[Turn], reply: bool = False) -> np.ndarray:
        """Encode turns. reply: also the beginning of the assistant's next one. Raises UserError if that fails."""
        try:
            messages = [
                {"role": role, "content": SIGN.join(self.without_special(content))}
                for role, content in turns
            ]
            source = self.settings["chat_template"]
            if isinstance(source, list):  # several, each with a name
                source = {each["name"]: each["template"] for each in source}["default"]
            text = self.environment.from_string(source).render(
                self.settings, messages=messages, tools=None, add_generation_prompt=reply
            )
            first, *rest = text.split(SIGN)
            return np.concatenate([self.encode(first), *map(self.encode_rest, rest)])
        except Exception as error:  # a template is a program, so it can fail in any way
            raise UserError(
                f"the model's chat template failed: {one_line(error)}"
            ) from error


def raise_exception(message: str) -> None:
    raise ValueError(message)
