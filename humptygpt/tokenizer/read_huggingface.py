"""The tokenizer of a model in Hugging Face's format -> one of ours, whose ids and text are those of transformers.

A folder, or one of these files: tokenizer.json, tokenizer.model (sentencepiece), vocab.json with merges.txt. The files
beside it say which tokens are special. No code is run, and transformers is not needed.
"""

from pathlib import Path

from humptygpt.core.errors import UserError
from humptygpt.core.schema import parse_json
from humptygpt.tokenizer.tokenizers import (
    PretrainedSentencePiece,
    PretrainedTokenizer,
    Tokenizer,
    load_engine,
)

TOKEN = (str, {"content": str}, None)  # a token as these files have it
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SETTINGS = {f"{key}?": TOKEN for key in NAMED} | {
    "tokenizer_class?": (str, None),
    "legacy?": (bool, None),
}
SETTINGS |= {
    f"{key}?": (bool, None) for key in ("add_bos_token", "add_eos_token", "add_prefix_space")
}
SETTINGS |= {
    "added_tokens_decoder?": {str: {"content": str}},
    "additional_special_tokens?": ([(str, dict)], None),
}
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
)  # the first that is there counts, as in transformers


def is_tokenizer(path: Path) -> bool:
    """Whether it is one of these files, or a folder with one."""
    return (path.is_file() and path.name in FILES) or any((path / name).is_file() for name in FILES)


def read_tokenizer(path: Path) -> Tokenizer:
    """Raises UserError where there is none, or it is damaged or of a kind that is not supported."""
    folder = path.parent if path.is_file() else path
    name = (
        path.name
        if path.is_file()
        else next((name for name in FILES if (path / name).is_file()), None)
    )
    try:
        if name not in FILES:
            raise ValueError(f"there is neither {' nor '.join(FILES)}")
        settings = read_settings(folder)
        if name == "tokenizer.model":
            return read_sentencepiece(folder / name, settings)
        if name == "tokenizer.json":
            engine = load_engine((folder / name).read_text(encoding="utf-8"))
        else:
            engine = read_merges(folder, settings)
        return finish(engine, settings, name)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: sentencepiece's
        reason = "".join(char if char.isprintable() else " " for char in str(error)[:500])
        raise UserError(f"cannot read the tokenizer in {path}: {reason}") from error


def read_settings(folder: Path) -> dict:
    """tokenizer_config.json and the older files beside it; tokens as strings, added ones as {id: {content, ...}}."""
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                found = parse_json((folder / name).read_bytes(), SETTINGS)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            settings |= {key: value for key, value in found.items() if value is not None}
    for key in NAMED:
        if isinstance(token := settings.get(key), dict):
            settings[key] = token["content"]
    if (folder / "added_tokens.json").is_file():
        older = parse_json((folder / "added_tokens.json").read_bytes(), {str: int})
        added = {
            str(i): {"content": token, "special": False, "normalized": False}
            for token, i in older.items()
        }
        settings["added_tokens_decoder"] = added | settings.get("added_tokens_decoder", {})
    more = settings.get("additional_special_tokens", [])
    settings["special"] = [settings[key] for key in NAMED if key in settings]
    settings["special"] += [
        token if isinstance(token, str) else str(token.get("content")) for token in more
    ]
    return settings


def added_tokens(settings: dict) -> list[tuple[int, dict]]:
    """(id, entry) of what added_tokens_decoder lists, in the order of the ids."""
    entries = settings.get("added_tokens_decoder", {})
    if unreadable := [key for key in entries if not key.isdecimal()]:
        raise ValueError(f"added_tokens_decoder has the id {unreadable[0]}, which is no number")
    return sorted((int(key), entry) for key, entry in entries.items())


def finish(engine, settings: dict, name: str) -> PretrainedTokenizer:
    """Add the special tokens that the files beside it name, and find those at the start and the end of a text."""
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for i, entry in added_tokens(settings):
        token = entry["content"]
        add = engine.add_special_tokens if entry.get("special") else engine.add_tokens
        if engine.token_to_id(token) is None or name == "vocab.json":
            add(
                [
                    AddedToken(
                        token,
                        **{
                            flag: entry[flag] for flag in flags if isinstance(entry.get(flag), bool)
                        },
                    )
                ]
            )
        if engine.token_to_id(token) != i:
            raise ValueError(
                f"added_tokens_decoder says that {token!r} has the id {i}, but it has another one"
            )
    known = {token.content for token in engine.get_added_tokens_decoder().values()}
    for token in settings["special"]:
        if token not in known:
            engine.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    bos = None
    if name != "tokenizer.json" and settings.get("add_bos_token"):
        bos = engine.token_to_id(settings.get("bos_token", ""))
    elif name == "tokenizer.json":  # there the file itself says what is put before a text
        plain, whole = (engine.encode("a", add_special_tokens=add).ids for add in (False, True))
        bos = (
            whole[0]
            if whole[: len(whole) - len(plain)] and whole[1 : 1 + len(plain)] == plain
            else None
        )
    eot = engine.token_to_id(settings["eos_token"]) if "eos_token" in settings else None
    return PretrainedTokenizer(engine.to_str(), eot, bos)


def read_merges(folder: Path, settings: dict):
    """The tokenizers.Tokenizer of GPT-2's vocab.json and merges.txt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = parse_json((folder / "vocab.json").read_bytes(), {str: int})
    if not (folder / "merges.txt").is_file():
        raise ValueError("vocab.json needs merges.txt beside it")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if wrong := next((pair for pair in pairs if len(pair) != 2), None):
        raise ValueError(f"merges.txt has the line {' '.join(wrong)!r}, which is no pair")
    try:
        engine = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    except Exception as error:  # tokenizers has no class of its own for it
        raise ValueError(f"vocab.json and merges.txt do not fit together: {error}") from error
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(settings.get("add_prefix_space"))
    )
    engine.decoder = decoders.ByteLevel()
    # GPT-2's default for all three, where the vocabulary has it
    if "<|endoftext|>" in vocab:
        settings["special"].append("<|endoftext|>")
        settings.setdefault("bos_token", "<|endoftext|>")
        settings.setdefault("eos_token", "<|endoftext|>")
    return engine


def read_sentencepiece(path: Path, settings: dict) -> PretrainedSentencePiece:
    from sentencepiece import SentencePieceProcessor

    proto = path.read_bytes()
    model = SentencePieceProcessor(model_proto=proto)
    control = {model.id_to_piece(i): i for i in range(model.vocab_size()) if model.is_control(i)}
    special = control | {model.id_to_piece(model.unk_id()): model.unk_id()}
    for i, entry in added_tokens(settings):
        if special.setdefault(entry["content"], i) != i:
            raise ValueError(
                f"added_tokens_decoder says that {entry['content']!r} has the id {i}, but it has another"
            )
    for token in settings["special"]:
        if token not in special:
            i = model.piece_to_id(token)
            special[token] = (
                max(model.vocab_size(), *(j + 1 for j in special.values()))
                if i == model.unk_id()
                else i
            )
    llama = settings.get("tokenizer_class", "").removesuffix("Fast") == "LlamaTokenizer"
    space = ("unless" if settings.get("legacy") else "first") if llama else "every"
    bos = settings.get("bos_token") or (
        model.id_to_piece(model.bos_id()) if model.bos_id() >= 0 else None
    )
    eos = settings.get("eos_token") or (
        model.id_to_piece(model.eos_id()) if model.eos_id() >= 0 else None
    )
    bos = special.get(bos) if settings.get("add_bos_token") else None
    return PretrainedSentencePiece(proto, special, space, special.get(eos), bos)
