"""The tokenizer of a model in Hugging Face's format -> one of ours, whose ids and text are those of transformers.

A folder, or one of these files: tokenizer.json, tokenizer.model (sentencepiece), vocab.json with merges.txt. The files
beside it say which tokens are special. No code is run, and transformers is not needed.
"""

from pathlib import Path

from humptygpt.core.errors import UserError, one_line
from humptygpt.core.schema import parse_json
from humptygpt.tokenizer.base import END_OF_TEXT, Tokenizer
from humptygpt.tokenizer.pretrained import (
    PretrainedSentencePiece,
    PretrainedTokenizer,
    load_engine,
)

# the first that is there counts, as in transformers
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKEN = (str, {"content": str}, None)  # a token as these files have it
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SWITCHES = ("legacy", "add_bos_token", "add_eos_token", "add_prefix_space")
SETTINGS = {
    **{f"{key}?": TOKEN for key in NAMED},
    **{f"{key}?": (bool, None) for key in SWITCHES},
    "tokenizer_class?": (str, None),
    "added_tokens_decoder?": {str: {"content": str}},
    "additional_special_tokens?": ([(str, {"content": str})], None),
}
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token


def is_tokenizer(path: Path) -> bool:
    """Whether it is one of these files, or a folder with one."""
    return (path.is_file() and path.name in FILES) or any((path / name).is_file() for name in FILES)


def read_tokenizer(path: Path) -> Tokenizer:
    """Raises UserError where there is none, or it is damaged or of a kind that is not supported."""
    folder = path
    names = [name for name in FILES if (path / name).is_file()]
    if path.is_file():
        folder = path.parent
        names = [path.name]
    try:
        if not set(names) & set(FILES):
            raise ValueError(f"there is neither {' nor '.join(FILES)}")
        settings = read_settings(folder)
        if names[0] == "tokenizer.model":
            return read_sentencepiece(folder / names[0], settings)
        if names[0] == "vocab.json":
            return read_merges(folder, settings)
        return read_json(folder / names[0], settings)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: sentencepiece's
        raise UserError(f"cannot read the tokenizer in {path}: {one_line(error)}") from error


# --------------------------------------------------------------------------------------
# The files that say which tokens are special


def read_settings(folder: Path) -> dict:
    """Return tokenizer_config.json and the older files beside it: tokens as strings, added ones as (id, entry)."""
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                content = parse_json((folder / name).read_bytes(), SETTINGS)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            settings |= {key: value for key, value in content.items() if value is not None}
    for key in NAMED:
        if key in settings:
            settings[key] = text_of(settings[key])
    more = settings.get("additional_special_tokens", [])
    settings["special"] = [settings[key] for key in NAMED if key in settings]
    settings["special"] += map(text_of, more)
    settings["added"] = added_tokens(folder, settings.get("added_tokens_decoder", {}))
    return settings


def text_of(token: str | dict) -> str:
    return token if isinstance(token, str) else token["content"]


def added_tokens(folder: Path, entries: dict) -> list[tuple[int, dict]]:
    """Return (id, entry) of the tokens that added_tokens_decoder and added_tokens.json list, in the order of ids."""
    if unreadable := [key for key in entries if not key.isdecimal()]:
        raise ValueError(f"added_tokens_decoder has the id {unreadable[0]}, which is no number")
    added = {}
    if (folder / "added_tokens.json").is_file():  # of an older version
        ids = parse_json((folder / "added_tokens.json").read_bytes(), {str: int})
        added = {i: {"content": token, "normalized": False} for token, i in ids.items()}
    return sorted((added | {int(key): entry for key, entry in entries.items()}).items())


def check_id(token: str, expected: int, actual: int) -> None:
    if expected != actual:
        raise ValueError(
            f"added_tokens_decoder says that {token!r} has the id {expected}, but it has another one"
        )


# --------------------------------------------------------------------------------------
# One function for each kind of file


def read_json(path: Path, settings: dict) -> PretrainedTokenizer:
    engine = load_engine(path.read_text(encoding="utf-8"))
    for _, entry in settings["added"]:
        if engine.token_to_id(entry["content"]) is None:
            add_token(engine, entry)
    add_special_tokens(engine, settings)
    # the file itself says what is put before a text
    plain, whole = (engine.encode("a", add_special_tokens=add).ids for add in (False, True))
    starts = len(whole) > len(plain) and whole[1 : 1 + len(plain)] == plain
    return PretrainedTokenizer(
        engine.to_str(), token_id(engine, settings, "eos_token"), whole[0] if starts else None
    )


def read_merges(folder: Path, settings: dict) -> PretrainedTokenizer:
    """Read GPT-2's vocab.json and merges.txt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # tokenizers has no class of its own for it
        raise ValueError(f"vocab.json and merges.txt do not fit together: {error}") from error
    engine = Tokenizer(model)
    prefix = bool(settings.get("add_prefix_space"))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    engine.decoder = decoders.ByteLevel()
    # GPT-2's default for all three, where the vocabulary has it
    if engine.token_to_id(END_OF_TEXT) is not None:
        settings["special"].append(END_OF_TEXT)
        settings.setdefault("bos_token", END_OF_TEXT)
        settings.setdefault("eos_token", END_OF_TEXT)
    for _, entry in settings["added"]:
        add_token(engine, entry)
    add_special_tokens(engine, settings)
    bos = token_id(engine, settings, "bos_token") if settings.get("add_bos_token") else None
    return PretrainedTokenizer(engine.to_str(), token_id(engine, settings, "eos_token"), bos)


def token_id(engine, settings: dict, key: str) -> int | None:
    return engine.token_to_id(settings[key]) if key in settings else None


def add_token(engine, entry: dict) -> None:
    from tokenizers import AddedToken

    flags = {flag: entry[flag] for flag in FLAGS if isinstance(entry.get(flag), bool)}
    add = engine.add_special_tokens if entry.get("special") else engine.add_tokens
    add([AddedToken(entry["content"], **flags)])


def add_special_tokens(engine, settings: dict) -> None:
    for i, entry in settings["added"]:
        check_id(entry["content"], i, engine.token_to_id(entry["content"]))
    known = {token.content for token in engine.get_added_tokens_decoder().values()}
    for token in settings["special"]:
        if token not in known:
            add_token(engine, {"content": token, "special": True, "normalized": False})


def read_sentencepiece(path: Path, settings: dict) -> PretrainedSentencePiece:
    from sentencepiece import SentencePieceProcessor

    proto = path.read_bytes()
    model = SentencePieceProcessor(model_proto=proto)
    special = {model.id_to_piece(i): i for i in range(model.vocab_size()) if model.is_control(i)}
    special[model.id_to_piece(model.unk_id())] = model.unk_id()
    for i, entry in settings["added"]:
        check_id(entry["content"], i, special.setdefault(entry["content"], i))
    for token in settings["special"]:
        i = model.piece_to_id(token)
        if i == model.unk_id():  # it is no piece: the next id
            i = max(model.vocab_size(), 1 + max(special.values()))
        special.setdefault(token, i)
    space = "every"
    if settings.get("tokenizer_class", "").removesuffix("Fast") == "LlamaTokenizer":
        space = "unless" if settings.get("legacy") else "first"
    ends = {}
    for key, i in (("bos_token", model.bos_id()), ("eos_token", model.eos_id())):
        default = model.id_to_piece(i) if i >= 0 else None
        ends[key] = special.get(settings.get(key) or default)
    bos = ends["bos_token"] if settings.get("add_bos_token") else None
    return PretrainedSentencePiece(proto, special, space, ends["eos_token"], bos)
