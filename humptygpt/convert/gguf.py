"""Convert a model in Hugging Face's format and its vocabulary to a single GGUF file, which llama.cpp can run.

The file resembles one from llama.cpp's own convert_hf_to_gguf.py. llama.cpp can run fewer of our models than
transformers: GPT-2 only with gelu_tanh, Llama only with silu, and each only with some kinds of tokenizer.
"""

import json
import logging
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from torch import Tensor

from humptygpt.config import UserError
from humptygpt.convert.families import ACTIVATION_NAMES, ROPE_SCALING
from humptygpt.convert.pretrained import PretrainedTokenizer
from humptygpt.convert.weight_files import Weights
from humptygpt.convert.write_huggingface import build_tokenizer
from humptygpt.tokenizers import (
    BYTE_TOKEN,
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
)
from model import ModelConfig, llama_scale

DTYPES = {  # the values of --dtype
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
ACTIVATIONS = {"gpt2": "gelu_tanh", "llama": "silu"}  # fixed in llama.cpp
HYPERPARAMETERS = {  # X in GGUFWriter.add_X: key of config.json
    "gpt2": {
        "block_count": "n_layer",
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "feed_forward_length": "n_inner",
        "head_count": "n_head",
        "layer_norm_eps": "layer_norm_epsilon",
    },
    "llama": {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "head_count": "num_attention_heads",
        "head_count_kv": "num_key_value_heads",
        "key_length": "head_dim",
        "value_length": "head_dim",
        "rope_dimension_count": "head_dim",
        "rope_freq_base": "rope_theta",
        "layer_norm_rms_eps": "rms_norm_eps",
    },
}
EMBEDDINGS = ("transformer.wte.weight", "model.embed_tokens.weight", "lm_head.weight")
# how Llama 3 splits text before byte pairs are merged
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {  # split_key() of each pre_tokenizer step: llama.cpp's name for the sequence
    (("ByteLevel", False, True),): "gpt-2",
    ((LLAMA3_PATTERN, None, None), ("ByteLevel", False, False)): "llama-bpe",
    ((None, None, None),): "default",  # the text is not split
    (("Metaspace", None, False),): "default",
}
logging.getLogger("gguf").setLevel(logging.ERROR)  # it logs every file it writes
Vocabulary = dict[str, object]  # X in GGUFWriter.add_X: its argument

# --------------------------------------------------------------------------------------
# The vocabulary


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Describe a tokenizer for GGUF. Raises UserError if none in llama.cpp produces the same tokens."""
    eot, bos = tokenizer.eot, tokenizer.bos
    if isinstance(tokenizer, CharTokenizer | ByteTokenizer):
        found = without_merges(tokenizer)
    elif isinstance(tokenizer, PretrainedTokenizer):
        found = with_merges(tokenizer, json.loads(tokenizer.content))
    else:
        found = with_merges(tokenizer, json.loads(build_tokenizer(tokenizer).to_str()))
        eot = tokenizer.pieces.index(END_OF_TEXT.encode())
    ends = {"eos_token_id": eot, "bos_token_id": eot if bos is None else bos}
    found |= {name: i for name, i in ends.items() if i is not None}
    return {"add_bos_token": bos is not None, "add_space_prefix": False} | found


def refusal(tokenizer: Tokenizer, why: str) -> UserError:
    return UserError(
        f"tokenizer={tokenizer.name} cannot be exported as GGUF: {why}; use --format=transformers"
    )


def without_merges(tokenizer: CharTokenizer | ByteTokenizer) -> Vocabulary:
    """Describe a tokenizer whose tokens are characters or bytes.

    llama.cpp's tokenizer type rwkv matches the longest token first, and is the only type that needs no end-of-text
    token. But it hangs if a text has the first byte of a token without the rest, which can happen with characters of
    another language. Alphabets with non-ASCII characters therefore use the type llama, which writes a space as "▁".
    """
    texts = tokenizer.pieces
    end = []
    if tokenizer.eot is not None:
        texts = texts[:-1]
        end = [END_OF_TEXT]
    types = [TokenType.NORMAL] * len(texts) + [TokenType.CONTROL] * len(end)
    if isinstance(tokenizer, ByteTokenizer) or tokenizer.alphabet.isascii():
        escaped = ["".join(f"\\x{byte:02x}" for byte in text) for text in texts]
        return {
            "tokenizer_model": "rwkv",
            "token_list": escaped + end,
            "token_types": types,
        }
    if not end or "▁" in tokenizer.alphabet:
        why = "in llama.cpp, non-ASCII characters need an end-of-text token, and '▁' stands for a space"
        raise refusal(tokenizer, why)
    tokens = [char.replace(" ", "▁") for char in tokenizer.alphabet] + end
    return {
        "tokenizer_model": "llama",
        "token_list": tokens,
        "token_types": types,
        "token_scores": [0.0] * len(tokens),
    }


def with_merges(tokenizer: Tokenizer, content: dict) -> Vocabulary:
    """Describe a byte-pair tokenizer like that of GPT-2, Llama 2 or Llama 3. content: its tokenizer.json.

    At the start of a prompt or after a special token, transformers' LlamaTokenizer may add one space fewer than
    llama.cpp.
    """
    model = content["model"]
    if model["type"] != "BPE" or not (split := known_split(tokenizer, content)):
        why = "llama.cpp needs byte pairs as in GPT-2, Llama 2 or Llama 3 (with sentencepiece: model_type=bpe)"
        raise refusal(tokenizer, why)
    tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    types = [TokenType.UNUSED] * len(tokens)
    for token, i in model["vocab"].items():
        tokens[i] = token
        is_byte = model["byte_fallback"] and BYTE_TOKEN.fullmatch(token)
        types[i] = TokenType.BYTE if is_byte else TokenType.NORMAL
    for entry in content["added_tokens"]:
        tokens[entry["id"]] = entry["content"]
        special = entry["special"]
        types[entry["id"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    pairs = model["merges"]
    if not model["byte_fallback"]:
        # llama.cpp requires at least one merge
        pairs = pairs or [[END_OF_TEXT, END_OF_TEXT]]
        return {
            "tokenizer_model": "gpt2",
            "tokenizer_pre": split,
            "token_list": tokens,
            "token_types": types,
            "token_merges": [" ".join(pair) for pair in pairs],
        }
    ranks = {a + b: rank for rank, (a, b) in enumerate(pairs)}
    return {
        "tokenizer_model": "llama",
        "token_list": [token.replace(" ", "▁") for token in tokens],
        "token_types": types,
        "token_scores": [-float(ranks.get(token, 0)) for token in tokens],
        "add_space_prefix": list(tokenizer.encode("a")) != list(tokenizer.encode_rest("a")),
    }


def known_split(tokenizer: Tokenizer, content: dict) -> str | None:
    """Find llama.cpp's name for the way a tokenizer.json splits text; None if llama.cpp would give different tokens."""
    model = content["model"]
    step = content["pre_tokenizer"] or {}
    split = SPLITS.get(tuple(map(split_key, step.get("pretokenizers") or [step])))
    if not model["byte_fallback"]:
        known = split == "gpt-2" or (split == "llama-bpe" and model["ignore_merges"])
        return split if known and not content["normalizer"] else None
    text = " a  ﬁ "
    pieces = [tokenizer.pieces[i] for i in tokenizer.encode_rest(text)]
    same = b"".join(pieces) == text.encode()
    return split if split == "default" and same else None


def split_key(step: dict) -> tuple[str | None, bool | None, bool | None]:
    """Describe a step of a pre_tokenizer: its pattern or type, whether it adds a space, and whether it splits."""
    pattern = step.get("pattern", {}).get("Regex") or step.get("type")
    return pattern, step.get("add_prefix_space"), step.get("use_regex", step.get("split"))


# --------------------------------------------------------------------------------------
# The model


def write_gguf(
    path: Path,
    content: dict,
    weights: Weights,
    vocabulary: Vocabulary,
    dtype: str,
    about: dict[str, str],
) -> None:
    """Write a GGUF file.

    content, weights: as returned by to_pretrained(). about: name and description. dtype: a key of DTYPES. Vectors and
    learned positions stay in float32. With q8_0, which packs weights in blocks of 32, so do matrices whose row length
    is not a multiple of 32. Padding rows of the embedding are left out, because llama.cpp would sample them. Raises
    UserError if llama.cpp does not support a part of the model, OSError if writing fails.
    """
    check_activation(content)
    architecture = content["model_type"]
    tokens = len(vocabulary["token_list"])
    hyperparameters = HYPERPARAMETERS[architecture]
    writer = GGUFWriter(path, architecture)
    for key, value in about.items():
        writer.add_string(f"general.{key}", value)
    kind, file_type = DTYPES[dtype]
    writer.add_file_type(file_type)
    writer.add_vocab_size(tokens)
    values = {name: content[key] for name, key in hyperparameters.items()}
    for name, value in (values | vocabulary).items():
        getattr(writer, f"add_{name}")(value)
    layers = content[hyperparameters["block_count"]]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], layers)
    for name, tensor in weights.items():
        tensor = arranged(name, tensor, content)
        if name in EMBEDDINGS:
            tensor = tensor[:tokens]
        exact = (
            tensor.dim() == 1
            or "wpe" in name
            or (dtype == "q8_0" and tensor.shape[-1] % 32)
        )
        stored = GGMLQuantizationType.F32 if exact else kind
        array = gguf.quants.quantize(tensor.float().contiguous().numpy(), stored)
        writer.add_tensor(
            names.get_name(name, (".weight", ".bias")), array, raw_dtype=stored
        )
    if "rope_scaling" in content:
        writer.add_tensor("rope_freqs.weight", rope_factors(content))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_activation(content: dict) -> None:
    """Raise UserError if llama.cpp would use a different activation."""
    supported = ACTIVATIONS[content["model_type"]]
    activation = ACTIVATION_NAMES[
        content.get("hidden_act") or content["activation_function"]
    ]
    if activation != supported:
        raise UserError(
            f"activation={activation} cannot be exported as GGUF; train with --activation={supported}"
        )


def arranged(name: str, tensor: Tensor, content: dict) -> Tensor:
    """Rearrange a tensor into llama.cpp's layout: (outputs, inputs), with features that rotate together side by side.

    In transformers they are D / 2 apart, so the rows of q_proj and k_proj are in a different order.
    """
    if content["model_type"] == "gpt2":
        return tensor.T if tensor.dim() == 2 and ".h." in name else tensor
    if ".q_proj." in name or ".k_proj." in name:
        halves = tensor.unflatten(0, (-1, 2, content["head_dim"] // 2))
        return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor


def rope_factors(content: dict) -> np.ndarray:
    """Compute the divisor of each rotary frequency: (D / 2,) float32."""
    D = content["head_dim"]
    frequency = content["rope_theta"] ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
    scaling = {ours: content["rope_scaling"][key] for key, ours in ROPE_SCALING.items()}
    return (1 / llama_scale(frequency, ModelConfig(**scaling))).numpy()
