"""A model in Hugging Face's format and a vocabulary -> one GGUF file, which llama.cpp runs.

The format is that of llama.cpp's own convert_hf_to_gguf.py. It holds less than that of transformers: GPT-2 with
gelu_tanh, Llama with silu, and the tokenizers of a few kinds.
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

DTYPES = {  # by our names
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
ACTIVATIONS = {"gpt2": "gelu_tanh", "llama": "silu"}  # what llama.cpp computes
HYPERPARAMETERS = {  # {end of the name of a method of GGUFWriter: key of config.json}
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
SPLITS = {  # by split_key() of each step
    (("ByteLevel", False, True),): "gpt-2",
    ((LLAMA3_PATTERN, None, None), ("ByteLevel", False, False)): "llama-bpe",
    ((None, None, None),): "default",  # a text is not split
    (("Metaspace", None, False),): "default",
}
logging.getLogger("gguf").setLevel(logging.ERROR)  # it reports every file it writes
Vocabulary = dict[str, object]  # {end of the name of a method of GGUFWriter: its value}

# --------------------------------------------------------------------------------------
# The vocabulary


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Return the vocabulary. Raises UserError where llama.cpp has no tokenizer that gives the same tokens."""
    if isinstance(tokenizer, CharTokenizer | ByteTokenizer):
        return without_merges(tokenizer)
    if isinstance(tokenizer, PretrainedTokenizer):
        return with_merges(tokenizer, json.loads(tokenizer.content), tokenizer.eot)
    content = json.loads(build_tokenizer(tokenizer).to_str())
    return with_merges(tokenizer, content, tokenizer.pieces.index(END_OF_TEXT.encode()))


def refusal(tokenizer: Tokenizer, why: str) -> UserError:
    return UserError(
        f"tokenizer={tokenizer.name} cannot be exported as GGUF: {why}; use --format=transformers"
    )


def without_merges(tokenizer: CharTokenizer | ByteTokenizer) -> Vocabulary:
    """llama.cpp's kind rwkv takes the longest token first, and is the only one that does without an end-of-text token.

    But it hangs where a text has the first byte of a token and not the rest. Among characters outside ASCII, that of
    another language may be; these are left to the kind llama, for which a space is "▁".
    """
    eot = tokenizer.eot
    texts = tokenizer.pieces if eot is None else tokenizer.pieces[:-1]
    end = [] if eot is None else [END_OF_TEXT]
    types = [TokenType.NORMAL] * len(texts) + [TokenType.CONTROL] * len(end)
    if isinstance(tokenizer, ByteTokenizer) or tokenizer.alphabet.isascii():
        escaped = ["".join(f"\\x{byte:02x}" for byte in text) for text in texts]
        return entries("rwkv", escaped + end, types, eot)
    if eot is None or "▁" in tokenizer.alphabet:
        why = "in llama.cpp, characters outside ASCII need an end-of-text token, and '▁' is a space"
        raise refusal(tokenizer, why)
    tokens = [char.replace(" ", "▁") for char in tokenizer.alphabet] + end
    return entries("llama", tokens, types, eot, token_scores=[0.0] * len(tokens))


def with_merges(tokenizer: Tokenizer, content: dict, eot: int | None) -> Vocabulary:
    """Return the vocabulary of a tokenizer.json of byte pairs, of GPT-2's, Llama 2's or Llama 3's kind.

    Of a prompt that begins with a space, or of text after a special token, LlamaTokenizer may add one space less.
    """
    model = content["model"]
    if model["type"] != "BPE" or not (split := known_split(tokenizer, content)):
        why = "llama.cpp has byte pairs (sentencepiece's with model_type=bpe) as GPT-2, Llama 2 and Llama 3 have them"
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
    bos = tokenizer.bos
    pairs = model["merges"]
    if not model["byte_fallback"]:
        # llama.cpp insists on a merge
        merges = [" ".join(pair) for pair in pairs or [[END_OF_TEXT, END_OF_TEXT]]]
        return entries(
            "gpt2", tokens, types, eot, bos, tokenizer_pre=split, token_merges=merges
        )
    ranks = {a + b: rank for rank, (a, b) in enumerate(pairs)}
    scores = [-float(ranks.get(token, 0)) for token in tokens]
    tokens = [token.replace(" ", "▁") for token in tokens]
    space = tokenizer.encode("a").tolist() != tokenizer.encode_rest("a").tolist()
    return entries(
        "llama", tokens, types, eot, bos, token_scores=scores, add_space_prefix=space
    )


def known_split(tokenizer: Tokenizer, content: dict) -> str | None:
    """Return llama.cpp's name for how a tokenizer.json splits a text; None where it would give other tokens."""
    model = content["model"]
    step = content["pre_tokenizer"] or {}
    split = SPLITS.get(tuple(map(split_key, step.get("pretokenizers") or [step])))
    if not model["byte_fallback"]:
        known = split == "gpt-2" or (split == "llama-bpe" and model["ignore_merges"])
        return split if known and not content["normalizer"] else None
    text = " a  ﬁ "
    same = "".join(tokenizer.decode_stream(tokenizer.encode_rest(text))) == text
    return split if split == "default" and same else None


def split_key(step: dict) -> tuple[str | None, bool | None, bool | None]:
    """Return by what a step of a pre_tokenizer splits, whether it adds a space, whether it splits at all."""
    pattern = step.get("pattern", {}).get("Regex") or step.get("type")
    return pattern, step.get("add_prefix_space"), step.get("use_regex", step.get("split"))


def entries(
    kind: str,
    tokens: list[str],
    types: list[TokenType],
    eot: int | None,
    bos: int | None = None,
    **more: object,
) -> Vocabulary:
    """Return the vocabulary of a kind of llama.cpp: gpt2 (byte pairs), llama (sentencepiece) or rwkv.

    eot: the token that ends a text; one in any case, but of rwkv. bos: the one that every text starts with. more:
    token_scores, or token_merges and the pattern by which a text is split first (tokenizer_pre).
    """
    ends = {"eos_token_id": eot, "bos_token_id": eot if bos is None else bos}
    return {
        "tokenizer_model": kind,
        "token_list": tokens,
        "token_types": types,
        **{name: i for name, i in ends.items() if i is not None},
        "add_bos_token": bos is not None,
        "add_space_prefix": False,
        **more,
    }


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

    content, weights: as from to_pretrained(). dtype: a key of DTYPES, of all matrices but that of positions, and for
    q8_0, whose blocks are 32 weights of a row, those of other rows. about: name and description. Rows of the embedding
    that stand for no token are left out: llama.cpp would draw them. Raises UserError where llama.cpp does not have what
    the model is made of, OSError where writing fails.
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
    """Raise UserError where llama.cpp would compute another one."""
    supported = ACTIVATIONS[content["model_type"]]
    activation = ACTIVATION_NAMES[
        content.get("hidden_act") or content["activation_function"]
    ]
    if activation != supported:
        raise UserError(
            f"activation={activation} cannot be exported as GGUF; train with --activation={supported}"
        )


def arranged(name: str, tensor: Tensor, content: dict) -> Tensor:
    """Return a tensor as llama.cpp has it: (outputs, inputs), and features that rotate together side by side.

    transformers has them D / 2 apart, which is another order of the rows of q_proj and k_proj.
    """
    if content["model_type"] == "gpt2":
        return tensor.T if tensor.dim() == 2 and ".h." in name else tensor
    if ".q_proj." in name or ".k_proj." in name:
        halves = tensor.unflatten(0, (-1, 2, content["head_dim"] // 2))
        return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor


def rope_factors(content: dict) -> np.ndarray:
    """Return what each rotary frequency is divided by, (D / 2,) float32."""
    D = content["head_dim"]
    frequency = content["rope_theta"] ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
    scaling = {ours: content["rope_scaling"][key] for key, ours in ROPE_SCALING.items()}
    return (1 / llama_scale(frequency, ModelConfig(**scaling))).numpy()
