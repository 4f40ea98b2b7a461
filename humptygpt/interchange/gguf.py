"""A model in Hugging Face's format and a vocabulary -> one GGUF file, which llama.cpp runs.

The format is that of llama.cpp's own convert_hf_to_gguf.py. It holds less than that of transformers: GPT-2 with
gelu_tanh, Llama with silu, and the tokenizers of a few kinds.
"""

import json
import logging
import math
from functools import singledispatch
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import sentencepiece
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from torch import Tensor

from humptygpt.core.errors import UserError
from humptygpt.interchange.families import ACTIVATION_NAMES
from humptygpt.tokenizer.tokenizers import (
    END_OF_TEXT,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    PretrainedSentencePiece,
    PretrainedTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from humptygpt.tokenizer.write_huggingface import (
    byte_merges,
    is_merged,
    printable,
    sentencepiece_entries,
)

KINDS = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0"}  # by our names of dtypes
FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
ACTIVATIONS = {  # what llama.cpp has: the key of config.json and our name
    "gpt2": ("activation_function", "gelu_tanh"),
    "llama": ("hidden_act", "silu"),
}
# how Llama 3 splits text before byte pairs are merged
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
)
LLAMA3_PATTERN += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
logging.getLogger("gguf").setLevel(logging.ERROR)  # it reports every file it writes


class Vocabulary(NamedTuple):
    """Tokens as llama.cpp has them."""

    model: str  # the kind of its tokenizer: gpt2 (byte pairs), llama (sentencepiece) or rwkv (the longest token first)
    tokens: list[str]
    eot: int | None  # the token that ends a text; one in any case, but of rwkv
    types: list[TokenType] | None = None
    scores: list[float] | None = None
    merges: list[str] | None = None
    split: str = "gpt-2"  # of byte pairs: the pattern by which a text is split first
    bos: int | None = None  # the token that every text starts with
    space: bool = False  # of sentencepiece: whether a space is put before a text


# --------------------------------------------------------------------------------------
# The vocabulary


@singledispatch
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Raises UserError where llama.cpp has no tokenizer that gives the same tokens."""
    raise AssertionError(f"{tokenizer.name} is not declared")


@vocabulary.register
def _(tokenizer: CharTokenizer | ByteTokenizer) -> Vocabulary:
    """llama.cpp's kind rwkv takes the longest token first, and is the only one that does without an end-of-text token.

    But it hangs where a text has the first byte of a token and not the rest. Among characters outside ASCII, that of
    another language may be; these are left to the kind llama, for which a space is "▁".
    """
    types = [
        TokenType.CONTROL if i == tokenizer.eot else TokenType.NORMAL
        for i in range(tokenizer.vocab_size)
    ]
    texts = tokenizer.pieces if tokenizer.eot is None else tokenizer.pieces[:-1]
    end = [] if tokenizer.eot is None else [END_OF_TEXT]
    if isinstance(tokenizer, ByteTokenizer) or tokenizer.alphabet.isascii():
        escaped = ["".join(f"\\x{byte:02x}" for byte in text) for text in texts]
        return Vocabulary("rwkv", escaped + end, tokenizer.eot, types)
    if tokenizer.eot is None:
        why = "in llama.cpp, characters outside ASCII need an end-of-text token, which this data has not"
        raise UserError(
            f"tokenizer=char cannot be exported with format=gguf: {why}; prepare it with --tokenizer=byte"
        )
    if "▁" in tokenizer.alphabet:
        why = "for llama.cpp, '▁' is a space"
        raise UserError(
            f"tokenizer=char cannot be exported with format=gguf: {why}; prepare it with --tokenizer=byte"
        )
    tokens = [char.replace(" ", "▁") for char in tokenizer.alphabet] + end
    return Vocabulary("llama", tokens, tokenizer.eot, types, [0.0] * len(tokens))


@vocabulary.register
def _(tokenizer: BytePairTokenizer) -> Vocabulary:
    tokens = [*map(printable, tokenizer.pieces[:-1]), END_OF_TEXT]
    merges, longer = (
        byte_merges(tokenizer),
        [piece for piece in tokenizer.pieces[:-1] if len(piece) > 1],
    )
    if len(merges) < len(longer):
        why = "its vocabulary has tokens that no merge makes"
        raise UserError(
            f"tokenizer={tokenizer.name} cannot be exported with format=gguf: {why}; use format=transformers"
        )
    types = [TokenType.NORMAL] * (len(tokens) - 1) + [TokenType.CONTROL]
    # llama.cpp insists on a merge
    merges = [" ".join(pair) for pair in merges] or [f"{END_OF_TEXT} {END_OF_TEXT}"]
    return Vocabulary("gpt2", tokens, len(tokens) - 1, types, merges=merges)


@vocabulary.register
def _(tokenizer: SentencePieceTokenizer) -> Vocabulary:
    """A "▁" in a text, which we spell in bytes, is a space for llama.cpp."""
    entries = sentencepiece_entries(tokenizer)
    if not is_merged(entries):
        why = "llama.cpp cannot spell in bytes what is not in a vocabulary of model_type=unigram"
        raise UserError(
            f"tokenizer=sentencepiece cannot be exported: {why}; prepare the data with --model_type=bpe"
        )
    kinds = {
        "byte": TokenType.BYTE,
        "end of text": TokenType.CONTROL,
        "line break": TokenType.USER_DEFINED,
    }
    types = [kinds.get(entry.kind, TokenType.NORMAL) for entry in entries]
    tokens, scores = (
        [entry.text.replace(" ", "▁") for entry in entries],
        [entry.score for entry in entries],
    )
    return Vocabulary("llama", tokens, types.index(TokenType.CONTROL), types, scores)


def refusal(name: str, why: str) -> UserError:
    return UserError(f"{name} cannot be exported with format=gguf: {why}; use format=transformers")


@vocabulary.register
def _(tokenizer: PretrainedTokenizer) -> Vocabulary:
    """Byte pairs, split as GPT-2 or Llama 3 does: of the many ways that a tokenizer.json may have, those are common."""
    described = json.loads(tokenizer.content)
    model, added = (
        described["model"],
        {entry["id"]: entry for entry in described.get("added_tokens") or ()},
    )
    split = known_split(described)
    if model.get("type") != "BPE" or described.get("normalizer") or split is None:
        raise refusal(
            tokenizer.name, "it is none of GPT-2's or Llama 3's kind, which llama.cpp has"
        )
    if split == "llama-bpe" and not model.get("ignore_merges"):
        raise refusal(tokenizer.name, "ignore_merges is false, unlike in Llama 3's own")
    names = {i: token for token, i in model["vocab"].items()} | {
        i: entry["content"] for i, entry in added.items()
    }
    tokens, types = [], []
    for i in range(tokenizer.vocab_size):
        control = i in added and added[i].get("special")
        kinds = [TokenType.UNUSED] * (i not in names) + [TokenType.CONTROL] * bool(control)
        types.append([*kinds, TokenType.USER_DEFINED if i in added else TokenType.NORMAL][0])
        tokens.append(names.get(i, f"[PAD{i}]"))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return Vocabulary(
        "gpt2", tokens, tokenizer.eot, types, merges=merges, split=split, bos=tokenizer.bos
    )


def known_split(described: dict) -> str | None:
    """llama.cpp's name for the way in which a tokenizer.json splits a text."""
    step = described.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers") or [step]
    found = [step.get("pattern", {}).get("Regex") or step.get("type") for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        return None
    if found == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    return (
        "llama-bpe"
        if found == [LLAMA3_PATTERN, "ByteLevel"] and not steps[1].get("use_regex", True)
        else None
    )


@vocabulary.register
def _(tokenizer: PretrainedSentencePiece) -> Vocabulary:
    """Of a prompt that begins with a space, or of text after a special token, LlamaTokenizer may add one space less."""
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.proto)
    size, special = model.vocab_size(), {i: token for token, i in tokenizer.special.items()}
    kinds = {}
    for i in range(tokenizer.vocab_size):
        byte = i < size and model.is_byte(i)
        unknown = i < size and model.is_unknown(i)
        kinds[i] = TokenType.BYTE if byte else TokenType.UNKNOWN if unknown else TokenType.NORMAL
        kinds[i] = TokenType.CONTROL if i in special and not unknown else kinds[i]
    normal = [model.get_score(i) for i in range(size) if kinds[i] == TokenType.NORMAL]
    if TokenType.BYTE not in kinds.values() or not all(score.is_integer() for score in normal):
        raise refusal(tokenizer.name, "llama.cpp needs byte pairs with byte_fallback, not unigrams")
    if model.normalize(" a  ﬁ ").removeprefix("▁").lstrip("▁") != "a▁▁ﬁ▁" or normal.count(0.0) > 1:
        raise refusal(
            tokenizer.name, "llama.cpp does not normalise a text, and has no user-defined symbols"
        )
    texts = [special.get(i) or model.id_to_piece(i) for i in kinds]
    scores = [model.get_score(i) if i < size else 0.0 for i in kinds]
    bos, space = tokenizer.bos, tokenizer.has_prefix
    return Vocabulary(
        "llama", texts, tokenizer.eot, list(kinds.values()), scores, bos=bos, space=space
    )


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.types:
        writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_tokenizer_pre(vocabulary.split)
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.eot is not None:
        writer.add_eos_token_id(vocabulary.eot)
        writer.add_bos_token_id(vocabulary.eot)
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    writer.add_add_bos_token(vocabulary.bos is not None)
    writer.add_add_space_prefix(vocabulary.space)


# --------------------------------------------------------------------------------------
# The model


def write_gguf(
    path: Path,
    content: dict,
    weights: dict[str, Tensor],
    vocabulary: Vocabulary,
    *,
    kind: str,
    about: dict[str, str],
) -> list[str]:
    """content, weights: as from to_pretrained(). kind: F32, BF16 or Q8_0, of all matrices but that of positions.

    about: name and description. Rows of the embedding that stand for no token are left out: llama.cpp would draw them.
    Returns the matrices that are F32 although kind is Q8_0, whose blocks are 32 weights of a row. Raises UserError
    where llama.cpp does not have what the model is made of, OSError where writing fails.
    """
    check_activation(content)
    architecture, tokens = content["model_type"], len(vocabulary.tokens)
    writer = GGUFWriter(path, architecture)
    for key, value in about.items():
        writer.add_string(f"general.{key}", value)
    writer.add_file_type(FILE_TYPES[kind])
    {"gpt2": add_gpt2, "llama": add_llama}[architecture](writer, content)
    writer.add_vocab_size(tokens)
    add_vocabulary(writer, vocabulary)
    layers = content.get("n_layer") or content["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], layers)
    exact = []
    for name, tensor in weights.items():
        tensor = arranged(name, tensor, content)
        if name in ("transformer.wte.weight", "model.embed_tokens.weight", "lm_head.weight"):
            tensor = tensor[:tokens]
        dtype = kind if tensor.dim() == 2 and "wpe" not in name else "F32"
        if dtype == "Q8_0" and tensor.shape[-1] % 32:
            dtype = "F32"
            exact.append(name)
        dtype = GGMLQuantizationType[dtype]
        array = gguf.quants.quantize(tensor.float().contiguous().numpy(), dtype)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), array, raw_dtype=dtype)
    if "rope_scaling" in content:
        writer.add_tensor("rope_freqs.weight", rope_factors(content))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


def check_activation(content: dict) -> None:
    """Raise UserError where llama.cpp would compute another one."""
    key, ours = ACTIVATIONS[content["model_type"]]
    if ACTIVATION_NAMES[content[key]] != ours:
        why = f"for {content['architectures'][0]}, llama.cpp has {ours} alone"
        given = f"activation={ACTIVATION_NAMES[content[key]]}"
        raise UserError(
            f"{given} cannot be exported with format=gguf: {why}; train with --activation={ours}"
        )


def add_gpt2(writer: GGUFWriter, content: dict) -> None:
    writer.add_block_count(content["n_layer"])
    writer.add_context_length(content["n_positions"])
    writer.add_embedding_length(content["n_embd"])
    writer.add_feed_forward_length(content["n_inner"] or 4 * content["n_embd"])
    writer.add_head_count(content["n_head"])
    writer.add_layer_norm_eps(content["layer_norm_epsilon"])


def add_llama(writer: GGUFWriter, content: dict) -> None:
    writer.add_block_count(content["num_hidden_layers"])
    writer.add_context_length(content["max_position_embeddings"])
    writer.add_embedding_length(content["hidden_size"])
    writer.add_feed_forward_length(content["intermediate_size"])
    writer.add_head_count(content["num_attention_heads"])
    writer.add_head_count_kv(content["num_key_value_heads"])
    writer.add_key_length(content["head_dim"])
    writer.add_value_length(content["head_dim"])
    writer.add_rope_dimension_count(content["head_dim"])
    writer.add_rope_freq_base(content["rope_theta"])
    writer.add_layer_norm_rms_eps(content["rms_norm_eps"])


def arranged(name: str, tensor: Tensor, content: dict) -> Tensor:
    """As llama.cpp has it: (outputs, inputs), and the features that rotate together side by side.

    transformers has them D / 2 apart, which is another order of the rows of q_proj and k_proj.
    """
    if content["model_type"] == "gpt2":
        return tensor.T if tensor.dim() == 2 and ".h." in name else tensor
    if ".q_proj." in name or ".k_proj." in name:
        halves = tensor.unflatten(0, (-1, 2, content["head_dim"] // 2))
        return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor


def rope_factors(content: dict) -> np.ndarray:
    """(D / 2,) float32: what each rotary frequency is divided by; see RotaryPosition in model.py."""
    scaling, D = content["rope_scaling"], content["head_dim"]
    frequency = content["rope_theta"] ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (kept + (1 - kept) / scaling["factor"])).numpy()
