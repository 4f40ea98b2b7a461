"""A run -> what its page computes with, as plain data: config, weights, tokenizer and metrics. explain/ reads it."""

import base64
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from humptygpt.checkpoint import checkpoint
from humptygpt.checkpoint.metrics import read_metrics
from humptygpt.core.errors import UserError
from humptygpt.interchange.load import load
from humptygpt.page.known_settings import check_settings
from humptygpt.tokenizer.tokenizers import (
    END_OF_TEXT,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

MODEL_TYPES = {1: "unigram", 2: "bpe"}  # TrainerSpec.ModelType of sentencepiece
BASE64 = 4 / 3  # characters for each byte


def page_data(
    out_dir: str, which: str = "best", *, start: str = "", max_mb: float = math.inf
) -> dict:
    """All that a page needs of a run. Raises UserError where the run has no such checkpoint, or the model is too large.

    which: best or latest. start: the text that the page starts with. max_mb: megabytes that the weights may take in it.
    """
    run = load(checkpoint.find_checkpoint(Path(out_dir), which))
    model, tokenizer, saved = run.model, run.tokenizer, run.saved
    if saved is None:
        raise UserError(f"out_dir={out_dir} is no run of train.py; a page shows one")
    check_size(model, max_mb)
    text = start if tokenizer.eot is None else start.removeprefix(END_OF_TEXT)
    tokenizer.encode(text)  # raises UserError where it has no tokens for it
    return {
        "name": Path(out_dir).resolve().name,
        "task": run.task,
        "progress": plain_row({key: saved["progress"][key] for key in ("iter", "best_val_loss")}),
        **model_data(model),
        "tokenizer": tokenizer_data(tokenizer),
        "start": start,
        "metrics": [
            plain_row(row) for row in read_metrics(run.path.with_name("metrics.jsonl")) if row
        ],
    }


def check_size(model: nn.Module, max_mb: float) -> None:
    """Raises UserError where the weights take more than max_mb megabytes in a page."""
    tensors = set(model.state_dict(keep_vars=True).values())
    size = sum(2 * p.numel() for p in tensors) * BASE64 / 1e6
    if size <= max_mb:
        return
    parameters = sum(p.numel() for p in model.parameters())
    raise UserError(
        f"the weights of {parameters:,} parameters take {size:.2f} MB in a page, more than max_mb={max_mb:g}: a"
        " browser would take long to open it; train a smaller model, or raise --max_mb"
    )


def plain_row(row: dict) -> dict:
    """Without what JSON cannot hold: a loss may be infinite, as the best one is before the first evaluation."""
    return {
        key: value
        for key, value in row.items()
        if not isinstance(value, float) or math.isfinite(value)
    }


# --------------------------------------------------------------------------------------
# The model


def model_data(model: nn.Module) -> dict:
    """What makeModel() in explain/data.js takes, with tokenizer_data(). Raises UserError for settings it ignores."""
    check_settings(model.config)
    return {"model": dataclasses.asdict(model.config), "weights": pack_weights(model)}


def pack_weights(model: nn.Module) -> dict:
    """Names, shapes and offsets of the tensors, and the bytes of all of them in base64.

    Matrices that are tied are there once, under both names.
    """
    packed, tensors, placed = bytearray(), [], {}
    for name, p in model.state_dict(keep_vars=True).items():
        if p not in placed:
            placed[p] = {"shape": list(p.shape), "offset": len(packed)}
            packed += to_float16(name, p.detach())
        tensors.append({"name": name, **placed[p]})
    return {"tensors": tensors, "bytes": base64.b64encode(packed).decode()}


def to_float16(name: str, tensor: Tensor) -> bytes:
    """The little-endian bytes of float32 rounded to float16. Raises UserError where a weight is beyond float16."""
    half = tensor.half()
    if not half.isfinite().all():
        largest = tensor.abs().max().item()
        raise UserError(
            f"{name} has a weight of {largest:.4g}, beyond float16's 65504: has its training diverged?"
        )
    return half.numpy().astype("<f2").tobytes()


# --------------------------------------------------------------------------------------
# Tokenizers


def tokenizer_data(tokenizer: Tokenizer) -> dict:
    """What makeTokenizer() in explain/tokenizer.js takes."""
    pieces = {
        "bytes": base64.b64encode(b"".join(tokenizer.pieces)).decode(),
        "lengths": [len(piece) for piece in tokenizer.pieces],
    }
    data = {"name": tokenizer.name, "eot": tokenizer.eot, "pieces": pieces}
    if isinstance(tokenizer, CharTokenizer):
        data["alphabet"] = tokenizer.alphabet
    if isinstance(tokenizer, SentencePieceTokenizer):
        data |= sentencepiece_data(base64.b64decode(tokenizer.state()["proto"]))
    return data


def sentencepiece_data(proto: bytes) -> dict:
    """model_type; scores: of each token, None where text never becomes it; byte_ids: the tokens of bytes 0 to 255.

    proto: a ModelProto of sentencepiece, whose Python interface does not give the model's type.
    """
    scores, byte_ids, model_type = [], {}, 1
    for number, value in read_fields(proto):
        if number == 1:  # SentencePiece: 1 piece, 2 score, 3 type
            piece = {1: b"", 2: b"\0\0\0\0", 3: 1} | dict(read_fields(value))
            matched = piece[3] in (
                1,
                4,
            )  # normal or user-defined; the others are unknown, control, unused and byte
            scores.append(float(str(np.frombuffer(piece[2], "<f4")[0])) if matched else None)
            if piece[3] == 6:  # byte: "<0x41>"
                byte_ids[int(piece[1][1:-1], 16)] = len(scores) - 2
        elif number == 2:  # TrainerSpec
            model_type = dict(read_fields(value)).get(3, model_type)
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"a sentencepiece model of type {model_type} is not one of: {', '.join(MODEL_TYPES.values())}"
        )
    # our ids are one less than sentencepiece's, see SentencePieceTokenizer
    return {
        "model_type": MODEL_TYPES[model_type],
        "scores": scores[1:],
        "byte_ids": [byte_ids[i] for i in range(256)],
    }


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protocol buffer: an int, or the bytes of a text, message or float."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield number, message[at : at + size]
        at += size
