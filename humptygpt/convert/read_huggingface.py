"""Read the tokenizer of a model in Hugging Face's format. Ids and text are the same as in transformers.

The path is a folder or one of these files: tokenizer.json, tokenizer.model (sentencepiece), vocab.json with merges.txt.
Other files in the folder name the special tokens. No code is run, and transformers is not needed.
"""

from pathlib import Path

from humptygpt.config import UserError, one_line
from humptygpt.convert.pretrained import PretrainedTokenizer, load_engine
from humptygpt.convert.sentencepiece_model import convert_sentencepiece
from humptygpt.schema import parse_json
from humptygpt.tokenizers import END_OF_TEXT, Tokenizer

TOKEN = (str, {"content": str}, None)  # schema of a token in these files
NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
SWITCHES = ("legacy", "add_bos_token", "add_prefix_space")
FLAGS = (
    "single_word",
    "lstrip",
    "rstrip",
    "normalized",
    "special",
)  # properties of an added token
SETTINGS = {
    **{f"{key}?": TOKEN for key in NAMED},
    **{f"{key}?": (bool, None) for key in SWITCHES},
    "tokenizer_class?": (str, None),
    "added_tokens_decoder?": {
        str: {"content": str, **{f"{flag}?": bool for flag in FLAGS}}
    },
    "additional_special_tokens?": ([(str, {"content": str})], None),
}


def tokenizer_file(path: Path) -> Path | None:
    """Return path if it is one of these files, else the first of them in the folder `path`; None if there is none."""
    files = [path] if path.is_file() else [path / name for name in READERS]
    return next((file for file in files if file.name in READERS and file.is_file()), None)


def read_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer from a folder or a file. Raises UserError if it is missing, damaged or not supported."""
    file = tokenizer_file(path)
    try:
        if file is None:
            raise ValueError(f"there is neither {' nor '.join(READERS)}")
        return READERS[file.name](file, read_settings(file.parent))
    except (
        ValueError,
        OSError,
        RuntimeError,
    ) as error:  # sentencepiece raises RuntimeError
        raise UserError(
            f"cannot read the tokenizer in {path}: {one_line(error)}"
        ) from error


def read_settings(folder: Path) -> dict:
    """Read tokenizer_config.json and older files with the same purpose.

    Named tokens, such as bos_token, become text. The entry "tokens" lists (id or None, description) for each token to
    add.
    """
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            content = parse_json((folder / name).read_bytes(), SETTINGS)
            settings |= {key: value for key, value in content.items() if value is not None}
    for key in settings.keys() & set(NAMED):
        settings[key] = text_of(settings[key])
    special = [settings[key] for key in NAMED if key in settings]
    special += map(text_of, settings.get("additional_special_tokens", []))
    tokens = [(int(i), x) for i, x in settings.get("added_tokens_decoder", {}).items()]
    if (folder / "added_tokens.json").is_file():  # written by older versions
        ids = parse_json((folder / "added_tokens.json").read_bytes(), {str: int})
        tokens += [(i, {"content": token, "normalized": False}) for token, i in ids.items()]
    tokens.sort(key=lambda token: token[0])
    settings["tokens"] = tokens + [(None, special_token(token)) for token in special]
    return settings


def special_token(token: str) -> dict[str, object]:
    return {"content": token, "special": True, "normalized": False}


def text_of(token: str | dict) -> str:
    return token if isinstance(token, str) else token["content"]


# --------------------------------------------------------------------------------------
# One function for each kind of file


def read_json(path: Path, settings: dict) -> PretrainedTokenizer:
    engine = load_engine(path.read_text(encoding="utf-8"))
    # the file itself says which token starts a text
    return finish(engine, settings | {"add_bos_token": False})


def read_sentencepiece(path: Path, settings: dict) -> PretrainedTokenizer:
    from sentencepiece import SentencePieceProcessor

    proto = path.read_bytes()
    space = "every"
    if settings.get("tokenizer_class", "").removesuffix("Fast") == "LlamaTokenizer":
        space = "unless" if settings.get("legacy") else "first"
    engine = convert_sentencepiece(proto, space)
    model = SentencePieceProcessor(model_proto=proto)
    ends = {"bos_token": model.bos_id(), "eos_token": model.eos_id()}
    defaults = {key: model.id_to_piece(i) for key, i in ends.items() if i >= 0}
    return finish(engine, defaults | settings)


def read_merges(path: Path, settings: dict) -> PretrainedTokenizer:
    """Read GPT-2's vocab.json and merges.txt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    try:
        model = models.BPE.from_file(str(path), str(path.with_name("merges.txt")))
    except Exception as error:  # tokenizers has no exception class of its own
        raise ValueError(f"vocab.json and merges.txt do not match: {error}") from error
    engine = Tokenizer(model)
    prefix = bool(settings.get("add_prefix_space"))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    engine.decoder = decoders.ByteLevel()
    if engine.token_to_id(END_OF_TEXT) is not None:  # GPT-2's default start and end token
        settings["tokens"].append((None, special_token(END_OF_TEXT)))
        settings = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} | settings
    return finish(engine, settings)


# the first file that exists is used, as in transformers
READERS = {
    "tokenizer.json": read_json,
    "tokenizer.model": read_sentencepiece,
    "vocab.json": read_merges,
}

# --------------------------------------------------------------------------------------
# The last step of all readers


def finish(engine, settings: dict) -> PretrainedTokenizer:
    """Add the special tokens that the settings name, and find the token that every text starts with."""
    from tokenizers import processors

    add_tokens(engine, settings["tokens"])
    start = settings.get("bos_token")
    if settings.get("add_bos_token") and start:
        engine.post_processor = processors.TemplateProcessing(
            single=[start, "$A"], special_tokens=[(start, engine.token_to_id(start))]
        )
    plain, whole = (engine.encode("a", add_special_tokens=add).ids for add in (False, True))
    starts = plain and whole[1 : 1 + len(plain)] == plain
    eot = engine.token_to_id(settings["eos_token"]) if "eos_token" in settings else None
    return PretrainedTokenizer(engine.to_str(), eot, whole[0] if starts else None)


def add_tokens(engine, tokens: list[tuple[int | None, dict]]) -> None:
    """Add the tokens that the engine does not know yet. Raises ValueError if one gets a different id than specified."""
    from tokenizers import AddedToken

    for i, entry in tokens:
        token = entry["content"]
        flags = {flag: entry[flag] for flag in FLAGS if flag in entry}
        add = engine.add_special_tokens if entry.get("special") else engine.add_tokens
        add([AddedToken(token, **flags)])
        if i not in (None, engine.token_to_id(token)):
            raise ValueError(
                f"added_tokens_decoder says that {token!r} has the id {i}, but it has a different one"
            )
