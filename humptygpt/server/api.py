"""OpenAI's API for one model: what a request may say, and the objects that answer it.

Source: OpenAI's API reference for /v1/models, /v1/chat/completions and /v1/completions.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

from humptygpt.cli import UserError, note
from humptygpt.files import append, check_schema, parse_json
from humptygpt.generation.chat import MESSAGES, check_room, make_room, read_messages
from humptygpt.generation.generator import Pipeline
from humptygpt.generation.sampling import (
    Context,
    Piece,
    check_sampling,
    encode_prompt,
    stream_texts,
    with_likeliest,
)

CHAT, CHUNK = "chat.completion", "chat.completion.chunk"
TEXT = "text_completion"
MOST_TOKENS = 4096  # tokens of an answer; a request for more gets this many
COMMON = {
    "stream?": bool,
    "stream_options?": {"include_usage?": bool},
    "max_tokens?": range(2**53),
    "stop?": (str, [str]),
    "temperature?": float,
    "top_p?": float,
    "top_k?": int,
    "min_p?": float,
    "repetition_penalty?": float,
    "seed?": int,
    "n?": range(1, 2),
    "logprobs?": bool,
    "top_logprobs?": range(21),
    "reply_tokens?": list,  # our own: ids of the tokens with which the answer begins
}
CHAT_SCHEMA = COMMON | {
    "messages": MESSAGES,
    "max_completion_tokens?": range(2**53),  # the new name of max_tokens
}
# keys that would change the answer and are not supported, and their values that ask for nothing, besides 0 and what is
# empty. All other unknown keys are ignored, as most servers do.
UNSUPPORTED = "response_format tool_choice function_call modalities logit_bias suffix"
UNSUPPORTED += " frequency_penalty presence_penalty echo"
NEUTRAL = ("auto", "none", ["text"], {"type": "text"})
TEXT_SCHEMA = COMMON | {"prompt": (str, [str])}
SAMPLING = "temperature top_p top_k min_p repetition_penalty"
DEFAULTS = dict.fromkeys(SAMPLING.split()) | {
    "stream": False,
    "stop": (),
    "temperature": 1,
    "repetition_penalty": 1.0,
    "logprobs": False,
    "top_logprobs": 0,
    "reply_tokens": [],
}


class Api:
    """Answers requests with one model. name: the model's id in answers. log: a file for questions and answers.

    chat() and complete() take a request as JSON and yield the answer in parts: events if the request says "stream";
    otherwise a space for each token, which JSON ignores, and then the whole answer. So the server notices a client that
    has left. If the request is not valid, the first step raises UserError or ValueError.
    """

    def __init__(self, loaded: Pipeline, name: str, log: str | None = None):
        self.loaded = loaded
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.block_size = loaded.model.config.block_size
        self.is_chat = loaded.task == "chat"
        self.name = name
        self.log = log
        self.started = int(time.time())

    def model_entry(self) -> dict:
        """Describe the model, as in a list of models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "humptygpt",
            # the rest is for our page
            "is_chat": self.is_chat,
            "context": self.block_size,
            "alphabet": self.tokenizer.alphabet,
            "questions": self.loaded.questions,
            "eot": self.tokenizer.eot,
        }

    def chat(self, body: bytes) -> Iterator[str]:
        request = read(body, CHAT_SCHEMA)
        if not self.is_chat:
            raise UserError(f"{self.name} is not a chat model; use /v1/completions")
        limit = request.get("max_completion_tokens", request.get("max_tokens", MOST_TOKENS))
        room = self.block_size - len(request["reply_tokens"])
        turns = read_messages(request["messages"])
        prompt, limit, _ = make_room(turns, self.tokenizer, room, limit, forgets=False)
        yield from self.answer(request | {"max_tokens": limit}, prompt, CHAT)

    def complete(self, body: bytes) -> Iterator[str]:
        request = {"max_tokens": 16} | read(body, TEXT_SCHEMA)
        prompts = request["prompt"]
        [text, *more] = prompts if isinstance(prompts, list) and prompts else [prompts]
        if more:
            raise UserError("there are several prompts; send a request for each")
        # an empty one is continued like a line break
        prompt = encode_prompt(text or "\n", self.tokenizer)
        check_room(prompt, self.block_size)
        yield from self.answer(request, prompt, TEXT)

    def answer(self, request: dict, prompt: list[int], kind: str) -> Iterator[str]:
        """Yield the answer in parts. prompt: token ids. kind: CHAT or TEXT."""
        begun = request["reply_tokens"]
        check_schema(begun, [range(self.tokenizer.vocab_size)], "reply_tokens")
        prompt = prompt + begun
        streams = request["stream"]
        if streams and kind == CHAT:
            kind = CHUNK
        frame = {
            "id": str(time.time_ns()),
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }
        text, tokens = "", []
        for written, piece in enumerate(self.write(prompt, request)):
            text += piece.text
            new = []
            if request["logprobs"] and not piece.end:
                new = [self.describe(piece, request["top_logprobs"])]
            tokens += new
            if streams:
                part = choice(kind, piece.text, new, piece.end, is_first=written == 0)
                yield event(frame | {"choices": [part]})
            else:
                yield " "
        if self.log:
            asked = {key: request[key] for key in ("messages", "prompt") if key in request}
            row = {"time": int(time.time()), **asked, "answer": text}
            try:
                append(Path(self.log), json.dumps(row, ensure_ascii=False))
            except UserError as error:  # the disk may be full
                note(str(error))
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": written,
            "total_tokens": len(prompt) + written,
        }
        if not streams:
            whole = choice(kind, text, tokens, piece.end, is_first=True)
            yield json.dumps(frame | {"choices": [whole], "usage": usage})
            return
        if request.get("stream_options", {}).get("include_usage"):
            yield event(frame | {"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    @torch.inference_mode()
    def write(self, prompt: list[int], request: dict) -> Iterator[Piece]:
        """Continue a prompt."""
        yield from stream_texts(
            Context(self.model, [prompt], device=self.loaded.device),
            self.tokenizer,
            [0],
            request["stop"],
            max_new_tokens=min(request["max_tokens"], MOST_TOKENS),
            seed=request["seed"] % 2**63,
            **{key: request[key] for key in SAMPLING.split()},
        )

    def describe(self, piece: Piece, likeliest: int) -> dict:
        """Return a token's entry in a chat's logprobs. likeliest: how many others to list."""
        pieces = self.tokenizer.pieces
        entry, *others = [
            {
                # OpenAI, too, writes \xe2\x80 for the bytes of an incomplete character
                "token": pieces[i].decode("utf-8", "backslashreplace"),
                "logprob": logprob,
                "bytes": list(pieces[i]),
                "id": i,  # our own
            }
            for i, logprob in with_likeliest(piece, likeliest)
        ]
        return entry | {"top_logprobs": others}


def read(body: bytes, schema: dict) -> dict:
    """Parse and check a request, and add the defaults. A null is the same as no entry."""
    request = {key: value for key, value in parse_json(body, {}).items() if value is not None}
    check_schema(request, schema)
    for key in UNSUPPORTED.split():
        value = request.get(key)
        if value and value not in NEUTRAL:
            raise UserError(f"{key} is not supported")
    request = DEFAULTS | {"seed": time.time_ns()} | request
    check_sampling(SimpleNamespace(**request))
    if isinstance(request["stop"], str):
        request["stop"] = [request["stop"]]
    if "" in request["stop"]:  # every text begins with it
        raise UserError("stop must not be empty")
    return request


def event(content: dict) -> str:
    """Format a part of a streamed answer."""
    return f"data: {json.dumps(content)}\n\n"


def choice(kind: str, text: str, tokens: list[dict], end: str | None, is_first: bool) -> dict:
    """Return an entry of "choices". tokens: entries of a chat's logprobs. end: why the text ends: stop or length."""
    logprobs = {"content": tokens} if tokens else None
    found = {"index": 0, "finish_reason": end, "logprobs": logprobs}
    if kind == TEXT:
        return found | {"text": text}
    message = {"role": "assistant"} if is_first else {}
    message["content"] = text
    return found | {"message" if kind == CHAT else "delta": message}
