"""Write a model and its vocabulary to a single GGUF file, which llama.cpp can run.

The file is laid out like those written by llama.cpp's own convert_hf_to_gguf.py. llama.cpp can run fewer of our models
than transformers can: GPT-2 only with gelu_tanh, Llama only with silu. Only tokenizers that were made here are
written; llama.cpp's own script knows those of other projects.
"""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from torch import Tensor, nn

from humptygpt.cli import UserError
from humptygpt.formats.families import find_family
from humptygpt.formats.huggingface import all_settings, exported_weights
from humptygpt.formats.tokenizer_json import tokenizer_json
from humptygpt.model import ModelConfig, llama_scale
from humptygpt.tokenizers.basic import (
    BYTE_TOKEN,
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
)
from humptygpt.tokenizers.pretrained import PretrainedTokenizer

DTYPES = {  # {value of --dtype: type in GGUF}
    "float32": GGMLQuantizationType.F32,
    "bfloat16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
ACTIVATIONS = {"gpt2": "gelu_tanh", "llama": "silu"}  # fixed by llama.cpp
# {X: key of ModelConfig whose value is passed to GGUFWriter.add_X}; keys that the family lacks are skipped
HYPERPARAMETERS = {
    "block_count": "n_layer",
    "context_length": "block_size",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_hidden",
    "head_count": "n_head",
    "head_count_kv": "n_kv_head",
    "key_length": "head_size",
    "value_length": "head_size",
    "rope_freq_base": "rope_base",
    # GPT-2 reads the first of these two, Llama the second
    "layer_norm_eps": "norm_eps",
    "layer_norm_rms_eps": "norm_eps",
}
EMBEDDINGS = ("transformer.wte.weight", "model.embed_tokens.weight", "lm_head.weight")
Vocabulary = dict[str, object]  # {X: argument of GGUFWriter.add_X, or None: leave X out}

# --------------------------------------------------------------------------------------
# The vocabulary


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Describe a tokenizer for GGUF. Raises UserError if llama.cpp cannot produce the same tokens."""
    base = getattr(tokenizer, "base", tokenizer)
    if isinstance(base, PretrainedTokenizer):
        raise UserError(
            "only a tokenizer that was made here can be written to a .gguf file; export a folder, as with"
            " --to=FOLDER, which llama.cpp's convert_hf_to_gguf.py reads"
        )
    if isinstance(base, CharTokenizer | ByteTokenizer):
        found = without_merges(base, tokenizer.pieces)
    else:
        found = with_merges(tokenizer)
    eot, end = tokenizer.eot, END_OF_TEXT.encode()
    if eot is None and end in tokenizer.pieces:
        eot = tokenizer.pieces.index(end)
    return found | {
        "eos_token_id": eot,
        "bos_token_id": eot,
        "add_bos_token": False,
        "add_space_prefix": False,
        "chat_template": tokenizer.chat_template,
    }


def without_merges(tokenizer: CharTokenizer | ByteTokenizer, pieces: list[bytes]) -> Vocabulary:
    """Describe a tokenizer whose tokens are characters or bytes. Raises UserError if llama.cpp has no equivalent.

    llama.cpp's tokenizer type rwkv matches the longest token first, and it is the only type that needs no end-of-text
    token. But it hangs on a text that contains the first byte of a token without the rest, which can happen with
    characters from another language. Alphabets with non-ASCII characters therefore use the type llama, which writes a
    space as "▁".

    pieces: all tokens. The special ones, such as the end-of-text token, are the last.
    """
    texts = tokenizer.pieces[: tokenizer.eot]
    end = [piece.decode() for piece in pieces[len(texts) :]]
    as_bytes = isinstance(tokenizer, ByteTokenizer) or tokenizer.alphabet.isascii()
    if as_bytes:
        tokens = ["".join(f"\\x{byte:02x}" for byte in text) for text in texts]
    elif not end or "▁" in tokenizer.alphabet:
        raise UserError(
            "tokenizer=char cannot be exported as GGUF, only to a folder: an alphabet with non-ASCII characters needs"
            " an end-of-text token and must not contain '▁'"
        )
    else:
        tokens = [text.decode().replace(" ", "▁") for text in texts]
    return {
        "tokenizer_model": "rwkv" if as_bytes else "llama",
        "token_list": tokens + end,
        "token_types": [TokenType.NORMAL] * len(tokens) + [TokenType.CONTROL] * len(end),
        "token_scores": [0.0] * len(pieces),
    }


def with_merges(tokenizer: Tokenizer) -> Vocabulary:
    """Describe a tokenizer that merges pairs: of bytes, as GPT-2's, or of characters, as sentencepiece's."""
    content = json.loads(tokenizer_json(tokenizer))
    model = content["model"]
    merges_characters = model["byte_fallback"]
    found = {}
    for token, i in model["vocab"].items():
        is_byte = merges_characters and BYTE_TOKEN.fullmatch(token)
        found[i] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
    for entry in content["added_tokens"]:
        found[entry["id"]] = entry["content"], TokenType.CONTROL
    for reply, i in getattr(tokenizer, "replies", {}).items():
        # llama.cpp also finds tokens of this type inside other texts; it would never find any other type
        found[i] = reply, TokenType.USER_DEFINED
    tokens, types = zip(*(found[i] for i in range(tokenizer.vocab_size)), strict=True)
    if not merges_characters:
        return {
            "tokenizer_model": "gpt2",
            "tokenizer_pre": "gpt-2",
            "token_list": tokens,
            "token_types": types,
            "token_merges": [" ".join(pair) for pair in model["merges"]],
        }
    ranks = {a + b: rank for rank, (a, b) in enumerate(model["merges"])}
    return {
        "tokenizer_model": "llama",
        "token_list": [token.replace(" ", "▁") for token in tokens],
        "token_types": types,
        "token_scores": [-float(ranks.get(token, 0)) for token in tokens],
    }


# --------------------------------------------------------------------------------------
# The model


def write_gguf(path: Path, title: str, model: nn.Module, vocabulary: Vocabulary, dtype: str) -> None:
    """Write a GGUF file.

    Vectors and learned positions stay in float32. With q8_0, which packs weights in blocks of 32, so do matrices whose
    row length is not a multiple of 32. Padding rows of the embedding are left out, because llama.cpp would sample them.

    title: the name of the model. dtype: a key of DTYPES. Raises UserError if llama.cpp cannot run such a model, and
    OSError if writing fails.
    """
    config = model.config
    family = find_family(config)
    supported = ACTIVATIONS[family.name]
    if config.activation != supported:
        raise UserError(
            f"activation={config.activation} cannot be exported as GGUF; train with --activation={supported}"
        )
    writer = GGUFWriter(path, family.name)
    settings = all_settings(model)
    known = family.settings.values()
    values = {name: settings[key] for name, key in HYPERPARAMETERS.items() if key in known}
    for name, value in ({"name": title} | values | vocabulary).items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.name.upper()], config.n_layer)
    # GGUF's matrices are (outputs, inputs), as ours
    weights = exported_weights(replace(family, transposed=False), model)
    for name, tensor in weights.items():
        if name in EMBEDDINGS:
            tensor = tensor[: len(vocabulary["token_list"])]
        if ".q_proj." in name or ".k_proj." in name:
            tensor = with_adjacent_pairs(tensor, config.features)
        exact = tensor.dim() == 1 or "wpe" in name or (dtype == "q8_0" and tensor.shape[-1] % 32)
        stored = GGMLQuantizationType.F32 if exact else DTYPES[dtype]
        array = gguf.quants.quantize(tensor.contiguous().numpy(), stored)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), array, raw_dtype=stored)
    if config.position == "rotary" and config.rope_factor != 1:
        writer.add_tensor("rope_freqs.weight", rope_factors(config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def with_adjacent_pairs(tensor: Tensor, head_size: int) -> Tensor:
    """Reorder the rows of q_proj or k_proj: the two features of a rotary pair, D / 2 apart, become neighbours."""
    halves = tensor.unflatten(0, (-1, 2, head_size // 2))
    return halves.transpose(1, 2).reshape(tensor.shape)


def rope_factors(config: ModelConfig) -> Tensor:
    """Compute the numbers by which llama.cpp divides the rotary frequencies: (D / 2,) float32."""
    D = config.features
    frequency = config.rope_base ** (-torch.arange(0, D, 2) / D)
    return 1 / llama_scale(frequency, config)
