"""Read the tokenizer of a model in Hugging Face's format. Ids and text are the same as in transformers.

The folder has a tokenizer.json; its tokenizer_config.json names the special tokens. A chat template is recognised if it
is the one that our exports have; any other is ignored. No code from the folder is run, and transformers is not needed.
"""

import json
import shlex
from pathlib import Path

from humptygpt.cli import UserError, note
from humptygpt.files import refuse_damaged
from humptygpt.tokenizers.basic import END_OF_TEXT, Tokenizer
from humptygpt.tokenizers.chat import TEMPLATE, ChatTokenizer
from humptygpt.tokenizers.pretrained import PretrainedTokenizer, load_engine

ENDS = ("bos_token", "eos_token")


def tokenizer_file(path: Path) -> Path:
    """Return `path` itself if it is a tokenizer.json. Otherwise return that of the folder `path`."""
    return path if path.name == "tokenizer.json" else path / "tokenizer.json"


def refuse_old_form(folder: Path, missing: str, kind: str) -> None:
    """Raise UserError that says how this class of transformers writes the file that the folder lacks."""
    path = f"{folder}"
    code = f"import transformers as t; t.{kind}.from_pretrained({path!r}).save_pretrained({path!r})"
    raise UserError(
        f"there is no {missing} in {folder}; if there is an older form of it, transformers rewrites it:"
        f" python -c {shlex.quote(code)}"
    )


def read_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer from a folder or a tokenizer.json. Raises UserError if it is missing or damaged."""
    file = tokenizer_file(path)
    if not file.is_file():
        refuse_old_form(path, file.name, "AutoTokenizer")
    with refuse_damaged(f"the tokenizer in {path}"):
        engine = load_engine(file.read_text(encoding="utf-8"))
        settings = read_settings(file.parent)
        # GPT-2's files do not name their end-of-text token
        if "tokenizer_class" not in settings and engine.token_to_id(END_OF_TEXT):
            settings = {"eos_token": END_OF_TEXT} | settings
        engine.add_special_tokens([settings[key] for key in ENDS if key in settings])
        bos, eot = (engine.token_to_id(settings.get(key, "")) for key in ENDS)
        starts = engine.encode("").ids[:1] == [bos]
        tokenizer = PretrainedTokenizer(engine.to_str(), eot, bos if starts else None)
    template = settings.get("chat_template")
    if template == TEMPLATE:
        return ChatTokenizer(tokenizer)
    if template:
        note(f"the chat template in {path} is ignored: without it, the model continues texts")
    return tokenizer


def read_settings(folder: Path) -> dict:
    """Read tokenizer_config.json and the chat template, if there are any, without entries that are null."""
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_bytes()) if path.is_file() else {}
    settings = {key: value for key, value in content.items() if value is not None}
    for key in ENDS:
        if isinstance(settings.get(key), dict):
            settings[key] = settings[key]["content"]
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    return settings
