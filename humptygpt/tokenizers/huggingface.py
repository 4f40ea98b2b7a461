"""Read the tokenizer of a model in Hugging Face's format. Ids and text are the same as in transformers.

The path is a folder or one of these files: tokenizer.json, tokenizer.model (sentencepiece), or vocab.json, which needs
merges.txt in the same folder. tokenizer_config.json there names the special tokens. A chat template is recognised if it
is the one that our exports have; any other is ignored. No code from the folder is run, and transformers is not needed.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from humptygpt.cli import note
from humptygpt.files import refuse_damaged
from humptygpt.tokenizers.basic import END_OF_TEXT, Tokenizer
from humptygpt.tokenizers.chat import TEMPLATE, ChatTokenizer
from humptygpt.tokenizers.pretrained import PretrainedTokenizer, load_engine
from humptygpt.tokenizers.sentencepiece_model import convert_sentencepiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Engine

ENDS = ("bos_token", "eos_token")


def tokenizer_file(path: Path) -> Path | None:
    """Return `path` itself if it is a file named in READERS. Otherwise return the first such file in it, or None."""
    files = [path, *(path / name for name in READERS)]
    return next((file for file in files if file.name in READERS and file.is_file()), None)


def read_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer from a folder or a file. Raises UserError if it is missing, damaged or not supported."""
    file = tokenizer_file(path)
    with refuse_damaged(f"the tokenizer in {path}"):
        if file is None:
            raise ValueError(f"there is neither {' nor '.join(READERS)}")
        settings = read_settings(file.parent)
        tokenizer = READERS[file.name](file, settings)
    template = settings.get("chat_template")
    if template == TEMPLATE:
        return ChatTokenizer(tokenizer)
    if template:
        note(
            f"the chat template in {path} is ignored: without it, the model continues texts"
        )
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


# --------------------------------------------------------------------------------------
# One function for each kind of file


def read_json(path: Path, settings: dict) -> PretrainedTokenizer:
    engine = load_engine(path.read_text(encoding="utf-8"))
    # ignore add_bos_token: tokenizer.json itself specifies whether to put a start token before a text
    return finish(engine, settings | {"add_bos_token": False})


def read_sentencepiece(path: Path, settings: dict) -> PretrainedTokenizer:
    scheme = None
    if settings.get("tokenizer_class") == "LlamaTokenizer":
        scheme = "always" if settings.get("legacy") else "first"
    engine, defaults = convert_sentencepiece(path.read_bytes(), scheme)
    return finish(engine, defaults | settings)


def read_merges(path: Path, settings: dict) -> PretrainedTokenizer:
    """Read a tokenizer stored as vocab.json and merges.txt, as GPT-2's is."""
    from tokenizers import ByteLevelBPETokenizer

    engine = ByteLevelBPETokenizer.from_file(
        str(path),
        str(path.with_name("merges.txt")),
        add_prefix_space=settings.get("add_prefix_space", False),
    )
    return finish(engine, settings)


# {file name: function that reads it}; the first file that exists is used, as in transformers
READERS = {
    "tokenizer.json": read_json,
    "tokenizer.model": read_sentencepiece,
    "vocab.json": read_merges,
}


def finish(engine: "Engine", settings: dict) -> PretrainedTokenizer:
    """Add the special tokens named in the settings, and determine the start-of-text and end-of-text tokens."""
    from tokenizers import AddedToken, processors

    added = {int(i): x for i, x in settings.get("added_tokens_decoder", {}).items()}
    for i, entry in sorted(added.items()):
        engine.add_tokens([AddedToken(**entry)])
        if i != engine.token_to_id(entry["content"]):
            raise ValueError(
                f"added_tokens_decoder gives {entry['content']!r} the id {i}, but its id in the vocabulary is different"
            )
    # GPT-2's files do not name their end-of-text token
    if "tokenizer_class" not in settings and engine.token_to_id(END_OF_TEXT) is not None:
        settings = {"eos_token": END_OF_TEXT} | settings
    engine.add_special_tokens([settings[key] for key in ENDS if key in settings])
    if (start := settings.get("bos_token")) and settings.get("add_bos_token"):
        engine.post_processor = processors.TemplateProcessing(
            single=[start, "$A"], special_tokens=[(start, engine.token_to_id(start))]
        )
    bos, eot = (engine.token_to_id(settings.get(key, "")) for key in ENDS)
    starts = engine.encode("").ids[:1] == [bos]
    return PretrainedTokenizer(engine.to_str(), eot, bos if starts else None)
