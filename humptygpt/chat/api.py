"""OpenAI's API for one model: what a request may say, and the objects that answer it.

Source: OpenAI's API reference for /v1/models, /v1/chat/completions and /v1/completions.
"""

import json
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from humptygpt.chat.tokens import MESSAGES, Turn
from humptygpt.cli import UserError
from humptygpt.files import check_schema, parse_json
from humptygpt.loading import Pipeline
from humptygpt.sampling import (
    Context,
    Piece,
    TextStream,
    encode_prompt,
    stream_texts,
    with_likeliest,
)

CHAT, CHUNK = "chat.completion", "chat.completion.chunk"
TEXT = "text_completion"
ECHOED = 128  # tokens of a prompt whose logits are computed at once
COMMON = {  # other keys are ignored, as other servers do
    "stream?": bool,
    "max_tokens?": range(4097),
    "stop?": (str, [str]),
    "temperature?": float,
    "top_p?": float,
    "seed?": range(2**63),
    "n?": range(1, 2),
}
CHAT_SCHEMA = COMMON | {
    "messages": MESSAGES,
    "logprobs?": bool,
    "top_logprobs?": range(21),
    "max_completion_tokens?": range(4097),  # the new name of max_tokens
    "reply_tokens?": list,  # our own: ids of the tokens with which the reply begins
}
TEXT_SCHEMA = COMMON | {
    "prompt": (str, list),
    "echo?": bool,
    "logprobs?": range(21),
}
DEFAULTS = {
    "stream": False,
    "stop": (),
    "temperature": 1,
    "echo": False,
    "logprobs": None,
}


class Api:
    """Answers requests with one model. name: the model's id in answers.

    chat() and complete() take a request as JSON and yield the answer in parts: events if the request says "stream";
    otherwise a space for each token, which JSON ignores, and then the whole answer. So the server notices a client that
    has left. If the request is not valid, the call or the first step raises UserError or ValueError.
    """

    def __init__(self, loaded: Pipeline, name: str):
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.device = loaded.device
        self.block_size = loaded.model.config.block_size
        self.is_chat = loaded.task == "chat"
        self.name = name

    def models(self) -> dict:
        model = {
            "id": self.name,
            "object": "model",
            "owned_by": "humptygpt",
            # the rest is for our page
            "is_chat": self.is_chat,
            "context": self.block_size,
            "ends": [self.tokenizer.eot, *self.tokenizer.ends],
        }
        return {"object": "list", "data": [model]}

    def chat(self, body: bytes) -> Iterator[str]:
        request = read(body, CHAT_SCHEMA)
        if not self.is_chat:
            raise UserError(f"{self.name} is not a chat model; use /v1/completions")
        turns = [
            Turn(each["role"], each["content"].strip()) for each in request["messages"]
        ]
        prompt = self.tokenizer.encode_turns(turns, reply=True).tolist()
        prompt += request.get("reply_tokens", [])
        # a longer reply would no longer see what it answers
        room = self.block_size - len(prompt)
        limit = request.get("max_completion_tokens", request.get("max_tokens", room))
        # as in a request for a text: how many of the likeliest tokens to list
        likeliest = request.get("top_logprobs", 0) if request["logprobs"] else None
        request |= {"max_tokens": min(limit, room), "logprobs": likeliest, "echo": False}
        return self.answer(request, prompt, CHAT)

    def complete(self, body: bytes) -> Iterator[str]:
        request = {"max_tokens": 16} | read(body, TEXT_SCHEMA)
        prompt = request["prompt"]
        if isinstance(prompt, list) and len(prompt) == 1 and type(prompt[0]) is not int:
            prompt = prompt[0]
        if isinstance(prompt, str):
            # an empty text is continued like a line break
            prompt = encode_prompt(prompt or "\n", self.tokenizer)
        return self.answer(request, prompt, TEXT)

    def answer(self, request: dict, prompt: list[int], kind: str) -> Iterator[str]:
        """Yield the answer in parts. prompt: token ids, which are checked here. kind: CHAT or TEXT."""
        check_schema(prompt, [range(self.tokenizer.vocab_size)], "prompt")
        what = "context_length_exceeded: the number of tokens in the prompt"
        check_schema(len(prompt), range(1, self.block_size), what)
        streams, likeliest = request["stream"], request["logprobs"]
        if streams and kind == CHAT:
            kind = CHUNK
        now = time.time_ns()
        frame = {
            "id": str(now),
            "object": kind,
            "created": now // 10**9,
            "model": self.name,
        }
        text, tokens = "", []
        for number, piece in enumerate(self.write(prompt, request)):
            text += piece.text
            if piece.end:
                written = number - len(prompt) * request["echo"]
                frame["usage"] = {
                    "prompt_tokens": len(prompt),
                    "completion_tokens": written,
                    "total_tokens": len(prompt) + written,
                }
            elif likeliest is not None:
                tokens.append(self.describe(piece, likeliest))
            if not piece.end and not streams:
                yield " "
                continue
            is_first = not streams or number == 0
            choices = [choice(kind, text, tokens, piece.end, is_first)]
            part = json.dumps(frame | {"choices": choices})
            yield f"data: {part}\n\n" if streams else part
            text, tokens = "", []
        if streams:
            yield "data: [DONE]\n\n"

    @torch.inference_mode()
    def write(self, prompt: list[int], request: dict) -> Iterator[Piece]:
        """Continue a prompt. With "echo", the pieces begin with the prompt's own tokens."""
        tokenizer = self.tokenizer
        if request["echo"]:
            rows = self.logits(prompt)
            decode = TextStream(tokenizer).decoder.decode
            for token, row in zip(prompt, rows, strict=False):
                yield Piece(0, decode(tokenizer.pieces[token]), token, row)
        yield from stream_texts(
            Context(self.model, [prompt], device=self.device),
            tokenizer,
            [0],
            request["stop"],
            max_new_tokens=request["max_tokens"],
            seed=request.get("seed", time.time_ns()),
            temperature=request["temperature"],
            top_p=request.get("top_p"),
        )

    def logits(self, prompt: list[int]) -> Iterator[Tensor | None]:
        """Yield the logits, (V,), that predict each token of a prompt; None for the first, which follows nothing."""
        yield None
        cache = {"cache": self.model.make_cache()} if self.model.has_cache else {}
        at_once = ECHOED if cache else len(prompt)
        for idx in torch.tensor([prompt], device=self.device).split(at_once, dim=1):
            logits, _ = self.model(idx, **cache)
            yield from logits[0, :, : self.tokenizer.vocab_size].float()

    def describe(self, piece: Piece, likeliest: int) -> dict:
        """Return a token's entry in a chat's logprobs. likeliest: how many others to list."""
        found = [(piece.token, None)]
        if piece.logits is not None:
            found = with_likeliest(piece, likeliest)
        pieces = self.tokenizer.pieces
        entry, *others = [
            {
                # OpenAI, too, writes \xe2\x80 for the bytes of an incomplete character
                "token": pieces[i].decode("utf-8", "backslashreplace"),
                "logprob": logprob,
                "bytes": list(pieces[i]),
                "id": i,  # our own
            }
            for i, logprob in found
        ]
        return entry | {"top_logprobs": others}


def read(body: bytes, schema: dict) -> dict:
    """Parse and check a request, and add the defaults. A null is the same as no entry."""
    request = parse_json(body, {})
    request = {key: value for key, value in request.items() if value is not None}
    check_schema(request, schema)
    request = DEFAULTS | request
    if not 0 <= request["temperature"] <= 2:
        raise UserError("temperature must be from 0 to 2")
    if not 0 < request.get("top_p", 1) <= 1:
        raise UserError("top_p must be above 0 and at most 1")
    if isinstance(request["stop"], str):
        request["stop"] = [request["stop"]]
    if "" in request["stop"]:  # every text begins with it
        raise UserError("stop must not be empty")
    return request


def choice(
    kind: str, text: str, tokens: list[dict], end: str | None, is_first: bool
) -> dict:
    """Return an entry of "choices". tokens: entries of a chat's logprobs. end: why the text ends: stop or length."""
    logprobs = {"content": tokens} if tokens else None
    found = {"index": 0, "finish_reason": end, "logprobs": logprobs}
    if kind != TEXT:
        message = {"role": "assistant"} if is_first else {}
        message["content"] = text
        return found | {"message" if kind == CHAT else "delta": message}
    if tokens:
        logprobs |= {
            "tokens": [token["token"] for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [
                {each["token"]: each["logprob"] for each in token["top_logprobs"]}
                for token in tokens
            ],
        }
    return found | {"text": text}
