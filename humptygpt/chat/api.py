"""OpenAI's API for one model: what a request may say, and the objects that answer it.

Source: OpenAI's API reference for /v1/models, /v1/chat/completions and /v1/completions.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from humptygpt.chat.tokens import ROLES, Turn
from humptygpt.sampling import Context, stream_texts
from humptygpt.schema import check_schema

MOST_TOKENS = 4096  # tokens of an answer
MOST_PROMPTS = 64  # prompts of a request
MOST_LIKELY = 20  # alternatives to a token
TOKENS = (range(MOST_TOKENS + 1), None)
COMMON = {  # entries of every request; all others are ignored, as other servers do
    "stream?": (bool, None),
    "stream_options?": ({"include_usage?": bool}, None),
    "temperature?": (float, None),
    "top_p?": (float, None),
    "seed?": (range(2**63), None),
    "stop?": (str, [str], None),
    "max_tokens?": TOKENS,
    "n?": (range(1, 2), None),
}
CHAT = COMMON | {
    "messages": [{"role": set(ROLES), "content": str}],
    "max_completion_tokens?": TOKENS,
    "logprobs?": (bool, None),
    "top_logprobs?": (range(MOST_LIKELY + 1), None),
    "reply_tokens?": [range(2**31)],  # our own: the tokens with which the reply begins
}
TEXT = COMMON | {
    "prompt": (str, list),
    "echo?": (bool, None),
    "logprobs?": (range(MOST_LIKELY + 1), None),
}


class BadRequest(Exception):
    """A request that is not valid."""


class Step(NamedTuple):
    """A token, and the text that it completes."""

    text: str
    token: int | None = None  # None: the rest of the text
    logprob: float | None = None  # None: nothing precedes the token
    likeliest: list[tuple[int, float]] = []  # noqa: RUF012, (token, log-probability), never changed


class Api:
    """Answers requests with a model. loaded: a sample.Pipeline. name: the model's id in answers."""

    def __init__(self, loaded, name: str):
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.device = loaded.device
        self.chats = loaded.task == "chat"
        self.name = name
        self.answers = 0

    def models(self) -> dict:
        own = {"id": self.name, "object": "model", "created": 0, "owned_by": "humptygpt"}
        return {"object": "list", "data": [own | {"chats": self.chats}]}

    def chat(self, request: object) -> Iterator[dict]:
        """Answer /v1/chat/completions: yield chunks, or a single answer.

        Raises BadRequest at the first step, or UserError for a text that cannot be encoded.
        """
        self.check(request, CHAT)
        if not self.chats:
            raise BadRequest(f"{self.name} is not a chat model; use /v1/completions")
        turns = [
            Turn(each["role"], each["content"].strip()) for each in request["messages"]
        ]
        begun = request.get("reply_tokens") or []
        prompt = [*self.tokenizer.encode_turns(turns, reply=True).tolist(), *begun]
        limit = request.get("max_completion_tokens") or request.get("max_tokens")
        steps = self.steps(
            request, prompt, limit or MOST_TOKENS, request.get("top_logprobs")
        )
        kind = "chat.completion"

        def choice(done: list[Step], end: str | None, chunk: bool) -> dict:
            text = "".join(step.text for step in done)
            message = {"content": text} if chunk else {"role": "assistant", "content": text}
            logprobs = None
            if request.get("logprobs"):
                logprobs = {"content": [self.entry(x) for x in done if x.token is not None]}
            found = {"index": 0, "logprobs": logprobs, "finish_reason": end}
            return found | {"delta" if chunk else "message": message}

        return self.answer(request, kind, [(prompt, steps)], choice)

    def complete(self, request: object) -> Iterator[dict]:
        """Answer /v1/completions: yield chunks, or a single answer. Raises BadRequest at the first step."""
        self.check(request, TEXT)
        texts = []
        count = request.get("logprobs")
        limit = request.get("max_tokens")
        limit = 16 if limit is None else limit
        for prompt in self.prompts(request["prompt"]):
            steps = self.steps(request, prompt, limit, count)
            texts.append((prompt, steps))

        def choice(done: list[Step], end: str | None, chunk: bool) -> dict:
            return {
                "index": 0,
                "text": "".join(step.text for step in done),
                "logprobs": None if count is None else self.table(done),
                "finish_reason": end,
            }

        return self.answer(request, "text_completion", texts, choice)

    # ----------------------------------------------------------------------------------
    # Checks

    def check(self, request: object, schema: dict) -> None:
        try:
            check_schema(request, schema)
        except ValueError as error:
            raise BadRequest(str(error)) from error
        for key, most in (("temperature", 2), ("top_p", 1)):
            if not 0 <= (request.get(key) or 0) <= most:
                raise BadRequest(f"{key} must be from 0 to {most}")

    def prompts(self, prompt: str | list) -> list[list[int]]:
        """Return the prompts of a request as token ids. Raises BadRequest."""
        if isinstance(prompt, str) or (prompt and type(prompt[0]) is int):
            prompt = [prompt]
        if not 0 < len(prompt) <= MOST_PROMPTS:
            raise BadRequest(f"prompt must have 1 to {MOST_PROMPTS} texts")
        return [self.ids(each) for each in prompt]

    def ids(self, prompt: object) -> list[int]:
        """Return a prompt's token ids; an empty text becomes the token that starts every text."""
        tokenizer = self.tokenizer
        if isinstance(prompt, str):
            prompt = tokenizer.encode(prompt).tolist() or tokenizer.start().tolist()
        known = range(tokenizer.vocab_size)
        if (
            not isinstance(prompt, list)
            or not prompt
            or not all(i in known for i in prompt)
        ):
            raise BadRequest(f"prompt must be text, or token ids below {len(known)}")
        return prompt

    # ----------------------------------------------------------------------------------
    # Text

    def steps(
        self, request: dict, prompt: list[int], limit: int, likeliest: int | None
    ) -> Iterator[Step]:
        """Generate up to `limit` tokens after a prompt, and first, with echo, the prompt itself."""
        room = self.model.config.block_size
        if len(prompt) >= room:
            raise BadRequest(
                f"the prompt has {len(prompt):,} tokens, but the context is {room:,}: context_length_exceeded"
            )
        if request.get("echo"):
            yield from self.echo(prompt, likeliest)
        stop = request.get("stop") or ()
        context = Context(self.model, [prompt], device=self.device)
        temperature = request.get("temperature")
        pieces = stream_texts(
            context,
            self.tokenizer,
            [0],
            (stop,) if isinstance(stop, str) else tuple(stop),
            max_new_tokens=min(limit, room - len(prompt)) if self.chats else limit,
            temperature=1.0 if temperature is None else temperature,
            top_p=request.get("top_p") or None,
            seed=request.get("seed") or time.time_ns() % 2**32,
        )
        for _, text, token, logits in pieces:
            if token is None:
                yield Step(text)
            else:
                yield self.step(text, token, logits.log_softmax(-1), likeliest)

    @torch.inference_mode()
    def echo(self, prompt: list[int], likeliest: int | None) -> Iterator[Step]:
        """Yield the tokens of a prompt with their log-probabilities."""
        yield Step(self.text(prompt[0]), prompt[0])
        ids = torch.tensor([prompt[:-1]], device=self.device)
        if len(prompt) > 1:
            logprobs = self.model(ids)[0][0].float().log_softmax(-1)
            for token, row in zip(prompt[1:], logprobs, strict=True):
                yield self.step(self.text(token), token, row, likeliest)

    def step(self, text: str, token: int, logprobs: Tensor, likeliest: int | None) -> Step:
        top = logprobs.topk(min(likeliest or 0, len(logprobs)))
        pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Step(text, token, float(logprobs[token]), pairs)

    def text(self, token: int) -> str:
        return self.tokenizer.pieces[token].decode("utf-8", "replace")

    # ----------------------------------------------------------------------------------
    # Answers

    def answer(
        self,
        request: dict,
        kind: str,
        texts: list[tuple[list[int], Iterator[Step]]],
        choice,
    ) -> Iterator[dict]:
        """Yield the chunks of an answer, or, without "stream", None after each token and then the whole answer.

        texts: the prompts, and the steps of their texts. choice: (steps, finish_reason, is a chunk) -> an entry of
        "choices".
        """
        self.answers += 1
        streams = bool(request.get("stream"))
        kind += ".chunk" if streams and kind == "chat.completion" else ""
        frame = {"id": f"{kind}-{self.answers}", "object": kind}
        frame |= {"created": int(time.time()), "model": self.name}
        choices = []
        written = 0
        for index, (_, steps) in enumerate(texts):
            done = []
            end = "length"
            for step in steps:
                done.append(step)
                if step.token in (self.tokenizer.eot, *self.tokenizer.ends):
                    end = "stop"
                entry = choice([step], None, True) | {"index": index}
                yield frame | {"choices": [entry]} if streams else None
            tokens = [step for step in done if step.token is not None]
            written += len(tokens)
            entry = choice([] if streams else done, end, streams) | {"index": index}
            choices.append(entry)
            if streams:
                yield frame | {"choices": [entry]}
        read = sum(len(prompt) for prompt, _ in texts)
        usage = {"prompt_tokens": read, "completion_tokens": written}
        usage["total_tokens"] = read + written
        if not streams:
            yield frame | {"choices": choices, "usage": usage}
        elif (request.get("stream_options") or {}).get("include_usage"):
            yield frame | {"choices": [], "usage": usage}

    def entry(self, step: Step) -> dict:
        """Return a token's entry in the logprobs of a chat."""
        likeliest = [self.token(i, logprob) for i, logprob in step.likeliest]
        return self.token(step.token, step.logprob) | {"top_logprobs": likeliest}

    def token(self, i: int, logprob: float | None) -> dict:
        piece = self.tokenizer.pieces[i]
        return {"token": self.text(i), "id": i, "logprob": logprob, "bytes": list(piece)}

    def table(self, steps: list[Step]) -> dict:
        """Return the logprobs of a text completion."""
        steps = [step for step in steps if step.token is not None]
        texts = [self.text(step.token) for step in steps]
        return {
            "tokens": texts,
            "token_logprobs": [step.logprob for step in steps],
            "top_logprobs": [
                {self.text(i): logprob for i, logprob in step.likeliest} or None
                for step in steps
            ],
            "text_offset": [sum(map(len, texts[:i])) for i in range(len(texts))],
            "content": [self.entry(step) for step in steps],  # as in a chat, for our page
        }
