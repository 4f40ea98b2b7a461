"""Another project's chat template, for models that come with one: a program in Jinja that writes a conversation.

It runs in Jinja's sandbox, as in transformers, so that it can do nothing but make text.
"""

from collections.abc import Iterable
from datetime import datetime

import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from humptygpt.chat.tokens import Turn
from humptygpt.config import UserError, one_line, refuse
from humptygpt.convert.read_huggingface import read_settings
from humptygpt.loading import Loaded
from humptygpt.schema import check_schema, parse_json
from humptygpt.tokenizers import Tokenizer

SCHEMA = {"chat_template?": (str, [{"name": str, "template": str}], None)}
GENERATION = {"eos_token_id?": (int, [int], None)}


def with_template(loaded: Loaded) -> Loaded:
    """Let a model whose folder has a chat template talk. Any other model stays as it is."""
    folder = loaded.path
    generation = {}
    with refuse(f"cannot read the chat template in {folder}: "):
        settings = read_settings(folder)
        check_schema(settings, SCHEMA)
        template = settings.get("chat_template")
        if isinstance(template, list):
            named = {each["name"]: each["template"] for each in template}
            template = named.get("default")
        if (path := folder / "chat_template.jinja").is_file():
            template = path.read_text(encoding="utf-8")
        if (path := folder / "generation_config.json").is_file():
            generation = parse_json(path.read_bytes(), GENERATION)
    if not template:
        return loaded
    ends = generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    tokenizer = TemplateTokenizer(loaded.tokenizer, template, settings, ends)
    return loaded._replace(tokenizer=tokenizer, task="chat")


class TemplateTokenizer:
    """A tokenizer that encodes conversations as a chat template writes them. Everything else is as in its base.

    settings: tokenizer_config.json, which names the special tokens. ends: tokens that end a reply, besides the base's
    eot. Raises UserError if the template cannot write a short conversation.
    """

    def __init__(
        self, base: Tokenizer, template: str, settings: dict, ends: Iterable[int | None]
    ):
        self.base = base
        self.template = template
        self.settings = settings
        self.ends = {base.eot, *ends}
        self.environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        functions = {"raise_exception": raise_exception, "strftime_now": strftime_now}
        self.environment.globals.update(functions)
        self.encode_turns([Turn("user", "Hi")], reply=True)

    def __getattr__(self, name: str) -> object:
        return getattr(self.base, name)

    def encode_turns(self, turns: Iterable[Turn], reply: bool = False) -> np.ndarray:
        """Encode turns. reply: also the beginning of the assistant's next one. Raises UserError if that fails."""
        values = {"tools": None, "documents": None, "add_generation_prompt": reply}
        values["messages"] = [turn._asdict() for turn in turns]
        try:
            template = self.environment.from_string(self.template)
            text = template.render(self.settings | values)
        except Exception as error:  # it is a program, which can fail in any way
            raise UserError(f"the model's chat template failed: {one_line(error)}") from error
        if not text:
            raise UserError("the model's chat template wrote nothing")
        return self.base.encode(text)


# --------------------------------------------------------------------------------------
# Functions for templates, as in transformers


def raise_exception(message: str) -> None:
    raise ValueError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
