"""OpenAI's API for one model: what a request may say, and the objects that answer it.

Source: OpenAI's API reference for /v1/models, /v1/chat/completions and /v1/completions.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from humptygpt.chat.tokens import ROLES, Turn
from humptygpt.config import UserError
from humptygpt.sampling import Context, TextStream, continue_texts, encode_prompt
from humptygpt.schema import check_schema, parse_json

TOKENS = 512  # of an answer, unless the request says otherwise
COUNT = (range(4097), None)
SCHEMA = {  # other keys are ignored, as other servers do
    "stream?": (bool, None),
    "stream_options?": ({"include_usage?": bool}, None),
    "max_tokens?": COUNT,
    "max_completion_tokens?": COUNT,  # the new name of max_tokens
    "stop?": (str, [str], None),
    "temperature?": (float, None),
    "top_p?": (float, None),
    "seed?": (range(2**63), None),
    "n?": (range(1, 2), None),
}
CHAT = SCHEMA | {
    "messages": [{"role": set(ROLES), "content": str}],
    "logprobs?": (bool, None),
    "top_logprobs?": (range(21), None),
    "reply_tokens?": (list, None),  # our own: ids of the tokens with which the reply begins
}
TEXT = SCHEMA | {
    "prompt": (str, list),
    "logprobs?": (range(21), None),
    "echo?": (bool, None),
}


class Step(NamedTuple):
    """One token of a text, and the characters that it completes."""

    text: str
    token: dict | None  # its entry in a chat's logprobs; None if they are not asked for
    end: str | None = None  # after the last token, why the text ends: stop or length


class Api:
    """Answers requests with one model. loaded: a sample.Pipeline. name: the model's id in answers."""

    def __init__(self, loaded, name: str):
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.device = loaded.device
        self.block_size = loaded.model.config.block_size
        self.is_chat = loaded.task == "chat"
        self.name = name

    def models(self) -> dict:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "humptygpt"}
        ours = {"is_chat": self.is_chat, "context": self.block_size}  # for our page
        return {"object": "list", "data": [model | ours | {"end": self.tokenizer.eot}]}

    def answer(self, body: bytes, schema: dict) -> Iterator[dict | None]:
        """Answer a request, given as JSON. schema: CHAT or TEXT.

        Yields the objects to send if the request says "stream"; otherwise None for each token and, at the end, the
        only object to send. The first step raises UserError or ValueError if the request is not valid.
        """
        request = read(body, schema)
        prompt = self.text(request) if schema is TEXT else self.chat(request)
        check_schema(prompt, [range(self.tokenizer.vocab_size)], "prompt")
        what = "context_length_exceeded: the number of tokens in the prompt"
        check_schema(len(prompt), range(1, self.block_size), what)
        streams = request.get("stream")
        kind = "text_completion"
        if schema is CHAT:
            kind = "chat.completion.chunk" if streams else "chat.completion"
        frame = {"id": f"{kind}-{time.time_ns()}", "object": kind}
        frame |= {"created": int(time.time()), "model": self.name}
        steps = []
        for step in self.write(prompt, request):
            steps.append(step)
            yield frame | {"choices": [choice([step], kind)]} if streams else None
        counts = [len(prompt), len(steps) - 1]
        if request.get("echo"):
            counts[1] -= counts[0]
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        frame["usage"] = dict(zip(names, (*counts, sum(counts)), strict=True))
        if not streams:
            yield frame | {"choices": [choice(steps, kind)]}
        elif request.get("stream_options", {}).get("include_usage"):
            yield frame | {"choices": []}

    def chat(self, request: dict) -> list[int]:
        """Return the conversation as token ids, up to where the model goes on."""
        if not self.is_chat:
            raise UserError(f"{self.name} is not a chat model; use /v1/completions")
        turns = [
            Turn(each["role"], each["content"].strip()) for each in request["messages"]
        ]
        ids = self.tokenizer.encode_turns(turns, reply=True).tolist()
        ids += request.get("reply_tokens", [])
        # a longer reply would no longer see what it answers
        request["max_tokens"] = min(request["max_tokens"], self.block_size - len(ids))
        wanted = request.get("logprobs")
        request["logprobs"] = request.get("top_logprobs", 0) if wanted else None
        return ids

    def text(self, request: dict) -> list[int]:
        prompt = request["prompt"]
        if isinstance(prompt, list) and len(prompt) == 1 and type(prompt[0]) is not int:
            prompt = prompt[0]
        if isinstance(prompt, str):
            # an empty text is continued like a line break
            return encode_prompt(prompt or "\n", self.tokenizer)
        return prompt

    @torch.inference_mode()
    def write(self, prompt: list[int], request: dict) -> Iterator[Step]:
        """Continue a prompt. With "echo", the steps begin with the prompt's own tokens."""
        likeliest = request.get("logprobs")
        stream = TextStream(self.tokenizer, request["stop"])
        # the first new token may complete a character that the prompt begins
        texts = [stream.decoder.decode(self.tokenizer.pieces[token]) for token in prompt]
        if request.get("echo"):
            logits = self.model(torch.tensor([prompt], device=self.device))[0][0].float()
            for token, text, row in zip(prompt, texts, [None, *logits], strict=False):
                yield Step(text, self.describe(token, row, likeliest))
        sampling = {"temperature", "top_p", "seed"} & request.keys()
        for (token,), (row,) in continue_texts(
            Context(self.model, [prompt], device=self.device),
            [0],
            self.tokenizer.vocab_size,
            max_new_tokens=request["max_tokens"],
            **{key: request[key] for key in sampling},
        ):
            yield Step(stream.feed(token), self.describe(token, row, likeliest))
            if stream.ended:
                break
        yield Step(stream.close(), None, "stop" if stream.ended else "length")

    def describe(self, token: int, logits: Tensor | None, count: int | None) -> dict | None:
        """Return a token's entry in a chat's logprobs, with the likeliest tokens at its place.

        logits: (V,), from which it was drawn; None: nothing precedes it. count: how many; None: no entry.
        """
        if count is None:
            return None
        pieces = self.tokenizer.pieces
        ids, logprobs = [token], {token: None}
        if logits is not None:
            logits = logits.log_softmax(-1)[: len(pieces)]
            ids += logits.topk(min(count, len(pieces))).indices.tolist()
            logprobs = logits.tolist()
        entry, *likeliest = [
            {
                # OpenAI, too, writes \xe2\x80 for the bytes of an incomplete character
                "token": pieces[i].decode("utf-8", "backslashreplace"),
                "logprob": logprobs[i],
                "bytes": list(pieces[i]),
                "id": i,  # our own
            }
            for i in ids
        ]
        return entry | {"top_logprobs": likeliest}


def read(body: bytes, schema: dict) -> dict:
    """Parse and check a request. Nulls are left out, and keys that may have several forms have one."""
    request = parse_json(body, schema)
    request = {key: value for key, value in request.items() if value is not None}
    for key, most in (("temperature", 2), ("top_p", 1)):
        if not 0 <= request.get(key, 0) <= most:
            raise UserError(f"{key} must be from 0 to {most}")
    stop = request.get("stop", [])
    limit = request.get("max_completion_tokens", TOKENS)
    defaults = {"seed": time.time_ns(), "max_tokens": limit}
    return defaults | request | {"stop": [stop] if isinstance(stop, str) else stop}


def choice(steps: list[Step], kind: str) -> dict:
    """Return an entry of "choices"."""
    text = "".join(step.text for step in steps)
    tokens = [step.token for step in steps if step.token]
    end = {"index": 0, "finish_reason": steps[-1].end, "logprobs": None}
    if tokens:
        end["logprobs"] = {"content": tokens}
    if kind == "chat.completion":
        return end | {"message": {"role": "assistant", "content": text}}
    if kind == "chat.completion.chunk":
        return end | {"delta": {"content": text}}
    if tokens:
        end["logprobs"] |= {
            "tokens": [token["token"] for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [
                {each["token"]: each["logprob"] for each in token["top_logprobs"]}
                for token in tokens
            ],
        }
    return end | {"text": text}
