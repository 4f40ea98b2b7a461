"""serve.py: OpenAI's API over one model, whoever asks, and however."""

import errno
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, TINY_RUN, WITHOUT_SAMPLE
from test_chat import chat, write_chats
from test_export import CASES, make_run
from test_score import lm_eval_task, scored, write_lines
from texts import make_text
from torch import nn

import export
import prepare_data
import sample
import serve
import train
from humptygpt.formats import checkpoint
from humptygpt.scoring import pairs
from humptygpt.scoring import text as texts
from humptygpt.server import api
from humptygpt.server.api import Api
from humptygpt.tokenizers.basic import ByteTokenizer
from humptygpt.tokenizers.chat import ChatTokenizer, Turn
from humptygpt.training import evaluation
from humptygpt.training import run as run_module

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
REPLY = "Grüße, 3 € für 🥚!\nwww <b>not bold</b>"


class Reciter(nn.Module):
    """A chat model that replies REPLY to everything. gate: a semaphore that lets it write so many tokens; None: all."""

    has_cache = False

    def __init__(self, tokenizer: ChatTokenizer, block_size: int = 400, shift: int = 0):
        super().__init__()
        self.tokenizer = tokenizer
        self.shift = shift  # of the script: 1 for a text that has no turns
        self.config = SimpleNamespace(block_size=block_size)
        self.gate = None
        self.script = [*tokenizer.encode(REPLY).tolist(), tokenizer.eot]

    def forward(self, idx):
        V = self.tokenizer.vocab_size
        logits = torch.arange(V).sin().repeat(*idx.shape, 1)
        start = 0
        for t, token in enumerate(idx[0].tolist()):
            if token == self.tokenizer.begin:
                start = t + len("assistant\n")
            place = t - start + self.shift
            if 0 <= place < len(self.script):
                logits[0, t, self.script[place]] = 9.0
        return logits, None

    def next_logits(self, idx):
        gate = self.gate
        if gate:
            assert gate.acquire(timeout=60)
        return self(idx)[0][:, -1]


@contextmanager
def serving(pipeline: sample.Pipeline, name: str = "tiny", **keys):
    """A server of this process, in a thread. keys: of ServeConfig."""
    keys = {"port": 0} | keys
    open_api = partial(Api, pipeline, name, log=keys.get("log"))
    server = serve.listen(serve.ServeConfig(**keys), open_api)
    server.RequestHandlerClass.log_message = lambda *_: None
    often = {"poll_interval": 0.01}
    thread = threading.Thread(target=server.serve_forever, kwargs=often, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(30)
        server.server_close()


def recite(block_size: int = 400, **keys):
    tokenizer = ChatTokenizer(ByteTokenizer(separated=True))
    model = Reciter(tokenizer, block_size)
    return serving(sample.Pipeline(model, tokenizer, "chat", torch.device("cpu")), **keys)


def close_gate(server) -> threading.Semaphore:
    """Let the reciter wait before each token."""
    server.api.model.gate = threading.Semaphore(0)
    return server.api.model.gate


def open_gate(server) -> None:
    gate, server.api.model.gate = server.api.model.gate, None
    if gate:
        gate.release(1000)


@pytest.fixture
def reciter():
    with recite() as server:
        yield server
        open_gate(server)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of two trained runs, out/chat and out/text."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(run_module, "draw_losses", lambda *args: None)
        patch.setattr(evaluation, "TEXT", WITHOUT_SAMPLE)
        words = ["wall", "king", "egg", "horse", "men", "sat", "fall"]
        write_chats(*(chat(f"{words[i % 7]} {i}", words[i % 5]) for i in range(120)))
        Path("tiny.txt").write_text(make_text())
        byte = "--tokenizer=byte"
        prepare_data.main(["--input=chats.jsonl", "--name=chats", byte])
        prepare_data.main(["--input=tiny.txt", "--name=tiny"])
        chats = ["--dataset=chats", "--block_size=128", "--out_dir=out/chat"]
        train.main([*TINY_RUN, *chats])
        train.main([*TINY_RUN, "--block_size=64", "--out_dir=out/text"])
    return folder


@pytest.fixture(scope="module")
def served_text(runs):
    loaded = sample.load(runs / "out/text")
    with serving(loaded) as server:
        server.loaded = loaded
        yield server


@pytest.fixture(scope="module")
def served_chat(runs):
    loaded = sample.load(runs / "out/chat")
    with serving(loaded) as server:
        server.loaded = loaded
        yield server


def ask(server, path: str, body: object = None, method: str = "POST", **headers):
    """Send a request. Returns the status and the parsed answer, or the answer's text if it is not JSON."""
    port = server if isinstance(server, int) else server.server_port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = response.headers["Content-Type"] == "application/json"
    return response.status, json.loads(content) if is_json else content.decode()


def ask_well(server, path: str, body: object) -> dict:
    status, answer = ask(server, path, body)
    assert status == 200, answer
    return answer


def chunks(server, path: str, body: dict) -> list[dict]:
    text = ask_well(server, path, body | {"stream": True})
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def content(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def client_of(server):
    openai = pytest.importorskip("openai", reason="needs openai: pip install openai")
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


# --------------------------------------------------------------------------------------
# Answers


def test_openais_client_gets_the_reply_of_sample_py_whole_and_streamed(served_chat):
    client = client_of(served_chat)
    assert [model.id for model in client.models.list()] == ["tiny"]
    said = [{"role": "user", "content": "king 3"}]
    keys = {"model": "tiny", "messages": said, "temperature": 0.9, "seed": 7}
    loaded = served_chat.loaded
    prompt = loaded.tokenizer.encode_turns([Turn("user", "king 3")], reply=True).tolist()
    config = sample.SampleConfig(temperature=0.9, seed=7, top_k=None, max_new_tokens=40)
    expected = "".join(x.text for x in sample.write([prompt], [0], config, loaded))
    whole = client.chat.completions.create(**keys, max_tokens=40)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.prompt_tokens == len(prompt)
    assert whole.usage.total_tokens == len(prompt) + whole.usage.completion_tokens
    counted = {"stream": True, "stream_options": {"include_usage": True}}
    *parts, last = client.chat.completions.create(
        **keys, **counted, max_completion_tokens=40
    )
    assert "".join(part.choices[0].delta.content for part in parts) == expected
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (last.choices, last.usage) == ([], whole.usage)


def test_openais_client_puts_a_streamed_reply_together(reciter):
    with client_of(reciter).chat.completions.stream(model="tiny", **HELLO) as stream:
        message = stream.get_final_completion().choices[0].message
    assert (message.role, message.content) == ("assistant", REPLY)


def test_openais_client_gets_the_text_of_sample_py_and_text_may_outgrow_the_context(
    served_text,
):
    client = client_of(served_text)
    expected = served_text.loaded.complete("Ak", max_new_tokens=100, temperature=0)
    keys = {"model": "tiny", "max_tokens": 100, "temperature": 0}
    answer = client.completions.create(prompt="Ak", **keys, echo=True)
    assert answer.choices[0].text == expected and len(expected) == 102 > 64
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 100
    stream = client.completions.create(prompt=["Ak"], stream=True, **keys)
    assert "Ak" + "".join(part.choices[0].text for part in stream) == expected


def said(*turns: tuple[str, object]) -> dict:
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": messages, "temperature": 0, "max_tokens": 5}


def test_parts_of_text_and_the_roles_of_other_programs_are_read(served_chat):
    parts = [{"type": "text", "text": " king"}, {"type": "text", "text": "3 "}]
    sent = said(
        ("developer", "Be brief."),
        ("user", parts),
        ("assistant", None),
        ("tool", "wall"),
    )
    same = said(
        ("system", "Be brief."), ("user", "king\n3"), ("assistant", ""), ("user", "wall")
    )
    given, plain = (ask_well(served_chat, CHAT, request) for request in (sent, same))
    assert (given["usage"], content(given)) == (plain["usage"], content(plain))


def test_n_answers_are_the_first_n_samples(served_chat):
    loaded = served_chat.loaded
    prompt = loaded.tokenizer.encode_turns([Turn("user", "king 3")], reply=True).tolist()
    config = sample.SampleConfig(
        temperature=0.9, seed=7, top_k=5, max_new_tokens=9, repetition_penalty=1.3
    )
    pieces = list(sample.write([prompt] * 3, [0, 1, 2], config, loaded))
    expected = ["".join(x.text for x in pieces if x.row == row) for row in range(3)]
    request = said(("user", "king 3")) | {"temperature": 0.9, "seed": 7, "top_k": 5}
    request |= {"n": 3, "max_tokens": 9, "repetition_penalty": 1.3}
    whole = ask_well(served_chat, CHAT, request)
    assert [each["message"]["content"] for each in whole["choices"]] == expected
    assert [each["index"] for each in whole["choices"]] == [0, 1, 2]
    assert whole["usage"]["completion_tokens"] == sum(not x.end for x in pieces)
    found, roles = ["", "", ""], []
    for part in chunks(served_chat, CHAT, request):
        (each,) = part["choices"]
        found[each["index"]] += each["delta"]["content"]
        roles += ["role"] * ("role" in each["delta"])
    assert (found, len(roles)) == (expected, 3)


def test_a_longer_answer_than_there_is_room_for_and_any_seed_are_allowed(reciter):
    answer = ask_well(reciter, CHAT, HELLO | {"max_tokens": 10**9, "seed": -1})
    assert content(answer) == REPLY


def test_clients_that_send_what_asks_for_nothing_get_an_answer(reciter):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}}
    neutral |= {"response_format": {"type": "text"}, "modalities": ["text"], "suffix": None}
    for choice in ("auto", "none"):
        keys = neutral | {"tool_choice": choice, "function_call": choice, "user": "me"}
        assert content(ask_well(reciter, CHAT, HELLO | keys)) == REPLY


def test_a_long_conversation_is_an_error_unless_the_server_forgets():
    long = said(("system", "s"), ("user", "a" * 30), ("assistant", "b" * 30), ("user", "c"))
    short = said(("system", "s"), ("user", "c"))
    for forgets in (False, True):
        with recite(block_size=100) as server:
            server.api.forgets = forgets
            status, answer = ask(server, CHAT, long)
            expected = ask_well(server, CHAT, short)
        if forgets:
            assert (status, answer["usage"]) == (200, expected["usage"])
        else:
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_the_model_and_the_servers_health_have_addresses(reciter):
    (entry,) = ask(reciter, "/v1/models?limit=1", method="GET")[1]["data"]
    assert type(entry["created"]) is int
    assert ask(reciter, "/v1/models/tiny", method="GET") == (200, entry)
    assert ask(reciter, "/v1/models/big", method="GET")[0] == 404
    assert ask(reciter, "/health", method="GET") == (200, {"status": "ok"})
    head, _, body = raw(reciter, b"HEAD /health HTTP/1.1\r\n" + HOST + b"\r\n").partition(
        b"\r\n\r\n"
    )
    assert b" 200 " in head and not body
    assert b" 200 " in raw(reciter, b"GET /health HTTP/1.0\r\n\r\n")  # as probes ask


def test_without_a_seed_two_answers_differ(served_text):
    request = {"prompt": "Ak", "max_tokens": 60, "temperature": 1.5}
    answers = [ask_well(served_text, TEXT, request)["choices"] for _ in range(2)]
    assert answers[0] != answers[1]
    seeded = [ask_well(served_text, TEXT, request | {"seed": 0})["choices"] for _ in "12"]
    assert seeded[0] == seeded[1]


def test_echo_gives_the_log_probability_of_every_token_of_a_prompt_some_at_a_time(
    served_text, monkeypatch
):
    loaded = served_text.loaded
    ids = loaded.tokenizer.encode("Akis unat osal").tolist()
    request = {"prompt": [ids], "echo": True, "logprobs": 3, "max_tokens": 2}
    answer = ask_well(served_text, TEXT, request)
    logprobs = answer["choices"][0]["logprobs"]
    (expected,) = texts.log_probabilities(loaded.model, [np.array(ids)])
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-5)
    assert "".join(logprobs["tokens"]) == answer["choices"][0]["text"]
    for token, top in zip(
        logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True
    ):
        assert len(top) == 3 and max(top.values()) >= token
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 2,
        "total_tokens": len(ids) + 2,
    }
    computed = []
    head = loaded.model.head
    monkeypatch.setattr(loaded.model, "head", lambda x: computed.append(x.shape) or head(x))
    monkeypatch.setattr(api, "ECHOED", 4)
    again = ask_well(served_text, TEXT, request | {"seed": 1})["choices"][0]["logprobs"]
    assert again["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-5)
    assert [shape[1] for shape in computed[:4]] == [4, 4, 4, 2]
    request = {"prompt": ids, "echo": True, "max_tokens": 0}
    assert ask_well(served_text, TEXT, request)["choices"][0]["text"] == "Akis unat osal"


def test_characters_arrive_whole_although_each_of_their_bytes_is_a_token(reciter):
    parts = chunks(reciter, CHAT, HELLO | {"logprobs": True, "top_logprobs": 5})
    pieces = [part["choices"][0]["delta"]["content"] for part in parts]
    assert "".join(pieces) == REPLY and "ü" in pieces and "🥚" in pieces
    entries = [
        x
        for part in parts
        for x in (part["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert (
        bytes(byte for entry in entries[:-1] for byte in entry["bytes"]) == REPLY.encode()
    )
    assert [entry["token"] for entry in entries[2:4]] == [r"\xc3", r"\xbc"]
    assert all(
        entry == {**entry["top_logprobs"][0], "top_logprobs": entry["top_logprobs"]}
        for entry in entries
    )
    begun = [*reciter.api.tokenizer.encode("Gr").tolist(), 0xC3]
    answer = ask_well(reciter, CHAT, HELLO | {"reply_tokens": begun})
    assert content(answer) == REPLY.removeprefix("Gr")


def test_a_text_ends_before_a_stop_text_or_with_its_turn_or_at_its_limit(reciter):
    for keys, text, end in [
        ({}, REPLY, "stop"),
        ({"stop": "für"}, "Grüße, 3 € ", "stop"),
        ({"stop": ["nothing", "3 €"], "logprobs": None}, "Grüße, ", "stop"),
        ({"max_tokens": 3}, "Gr", "length"),
        ({"max_tokens": 4, "max_completion_tokens": None}, "Grü", "length"),
        ({"max_tokens": 0}, "", "length"),
    ]:
        choice = ask_well(reciter, CHAT, HELLO | keys)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, end)
        assert choice["logprobs"] is None


def test_a_reply_ends_where_the_context_does():
    with recite(block_size=40) as server:
        answer = ask_well(server, CHAT, HELLO)
    assert answer["usage"]["total_tokens"] == 40
    assert answer["choices"][0]["finish_reason"] == "length"


# --------------------------------------------------------------------------------------
# Bad requests

BAD = {
    "the content must be dict": [],
    "messages is missing": {},
    "messages must be list": {"messages": "Hello"},
    "messages[0] must be dict": {"messages": ["Hello"]},
    "messages[0].content must be str": {"messages": [{"role": "user", "content": 1}]},
    "messages[0].content[0].type must be text": {
        "messages": [{"role": "user", "content": [{"type": "image_url"}]}]
    },
    "text is missing": {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    "messages[0].role must be assistant or": {"messages": [{"role": "x", "content": ""}]},
    "temperature=-1 must be at least 0": HELLO | {"temperature": -1},
    "temperature must be float": HELLO | {"temperature": "hot"},
    "top_p=0 must be above 0": HELLO | {"top_p": 0},
    "stop must not be empty": HELLO | {"stop": ["a", ""]},
    "stop must not be": HELLO | {"stop": ""},
    "max_tokens must be an int from 0": HELLO | {"max_tokens": -1},
    "n must be an int from 1 to 16": HELLO | {"n": 17},
    "min_p=-0.1 must be at least 0": HELLO | {"min_p": -0.1},
    "response_format is not supported": HELLO
    | {"response_format": {"type": "json_object"}},
    "tool_choice is not supported": HELLO | {"tool_choice": "required"},
    "repetition_penalty=0 must be above 0": HELLO | {"repetition_penalty": 0},
    "frequency_penalty is not supported": HELLO | {"frequency_penalty": 0.5},
    "presence_penalty is not supported": HELLO | {"presence_penalty": -1},
    "stream_options.include_usage must be bool": HELLO
    | {"stream_options": {"include_usage": 1}},
    "stop must be str or list": HELLO | {"stop": 1},
    "logprobs must be bool": HELLO | {"logprobs": 5},
    "top_logprobs must be an int from 0 to 20": HELLO | {"top_logprobs": 21},
    "stream must be bool": HELLO | {"stream": "yes"},
    "must be an int from 0 to 258": HELLO | {"reply_tokens": [259]},
    "the prompt takes 419 tokens, and the model's context has 400": {
        "messages": [{"role": "user", "content": "x" * 400}]
    },
    "messages is empty": {"messages": []},
    "the text has '\\ud800', which is half": {
        "messages": [{"role": "user", "content": "\ud800"}]
    },
    "Expecting": b'{"messages": [',
    "temperature=nan must be at least 0": b'{"messages": [], "temperature": NaN}',
    "top_p=inf must be": b'{"messages": [], "top_p": 1e999}',
    "from 1 to 1,000,000; chunked bodies are not": b"",
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_chat_request_is_an_error_in_openais_form(reciter, message):
    for extra in ({}, {"stream": True}):
        body = BAD[message]
        body = body | extra if isinstance(body, dict) and "stream" not in body else body
        status, answer = ask(reciter, CHAT, body)
        assert status == 400
        assert answer["error"].keys() == {"message", "type", "param", "code"}
        assert message in answer["error"]["message"]
    assert content(ask_well(reciter, CHAT, HELLO)) == REPLY


BAD_PROMPTS = {
    "prompt is missing": {},
    "prompt must be str or list": {"prompt": 1},
    "prompt[1] must be an int": {"prompt": [1, "a"]},
    "prompt[0] must be an int from": {"prompt": [1.0]},
    "there are several prompts": {"prompt": ["one", "two"]},
    "prompt[0] must be an int ": {"prompt": [True, False]},
    "prompt[0] must be an int from 0 to": {"prompt": [10**6]},
    "the prompt takes 64 tokens, and the model's context has 64": {"prompt": "A" * 64},
    "character 'é' (U+00E9)": {"prompt": "é"},
    "echo must be bool": {"prompt": "A", "echo": 1},
    "logprobs must be an int": {"prompt": "A", "logprobs": True},
    "is not a chat model": HELLO,
}


@pytest.mark.parametrize("message", BAD_PROMPTS)
def test_a_bad_text_request_is_an_error_in_openais_form(served_text, message):
    path = CHAT if "messages" in BAD_PROMPTS[message] else TEXT
    status, answer = ask(served_text, path, BAD_PROMPTS[message])
    assert status == 400 and message in answer["error"]["message"]
    assert ask_well(served_text, TEXT, {"prompt": "A"})


def raw(server, request: bytes) -> bytes:
    """Send bytes and no more. Returns all that the server sends until it closes the connection."""
    with socket.create_connection(
        ("127.0.0.1", server.server_port), timeout=30
    ) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(10**6), b""))


HOST = b"Host: localhost\r\n"
RAW = {
    "missing length": (400, b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"\r\n{}"),
    "no number": (
        400,
        b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Length: x\r\n\r\n{}",
    ),
    "negative": (
        400,
        b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Length: -5\r\n\r\n{}",
    ),
    "path": (404, b"POST /v1/nothing HTTP/1.1\r\n" + HOST + b"\r\n"),
    "page": (404, b"GET /etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n"),
    "bad address": (400, b"GET http://[bad/v1 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "bad origin": (400, b"GET / HTTP/1.1\r\nOrigin: http://[bad\r\n" + HOST + b"\r\n"),
    "method": (501, b"PUT / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "line": (414, b"GET /" + b"a" * 70_000),
    "headers": (431, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n"),
}


@pytest.mark.parametrize("kind", RAW)
def test_what_is_no_valid_http_request_is_an_error_in_openais_form(reciter, kind):
    status, request = RAW[kind]
    head, _, body = raw(reciter, request).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert json.loads(body)["error"]["message"]


def test_a_body_of_many_megabytes_is_answered_with_an_error(reciter):
    status, answer = ask(reciter, CHAT, b" " * 20_000_000)
    assert status == 400 and "1,000,000" in answer["error"]["message"]


@pytest.mark.parametrize(
    "status, headers",
    [
        (200, {}),
        (200, {"Host": "localhost:1", "Origin": "http://localhost:1"}),
        (200, {"Host": "[::1]:1"}),
        (403, {"Host": "evil.example:1"}),
        (403, {"Host": "evil.example:1", "Origin": "http://evil.example:1"}),
        (403, {"Host": "localhost.evil.example"}),
        (403, {"Origin": "http://evil.example"}),
        (403, {"Origin": "http://localhost:2", "Host": "localhost:1"}),
        (403, {"Origin": "null"}),
    ],
)
def test_a_page_of_another_site_is_refused(reciter, status, headers):
    assert ask(reciter, CHAT, HELLO, **headers)[0] == status
    assert ask(reciter, "/", None, "GET", **headers)[0] == status


def test_names_that_the_user_allows_may_be_asked():
    with recite(allowed_hosts=("Box.local", "other")) as server:
        for host in ("box.local:80", "BOX.local", "other:1"):
            assert ask(server, "/health", method="GET", Host=host)[0] == 200
        assert ask(server, "/health", method="GET", Host="third:1")[0] == 403


def test_a_server_may_listen_on_an_ipv6_address():
    with recite(host="::1") as server:
        connection = http.client.HTTPConnection("::1", server.server_port, timeout=30)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200


def test_a_server_with_a_key_answers_only_those_who_send_it(folder, monkeypatch):
    Path("key").write_text("geheim\n")
    with recite(api_key="FILE:key") as server:
        for sent in ({}, {"Authorization": "Bearer wrong"}):
            for path, method in ((CHAT, "POST"), ("/v1/models", "GET")):
                status, answer = ask(server, path, HELLO, method, **sent)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert ask(server, "/", method="GET")[0] == 200
    monkeypatch.setenv("HUMPTYGPT_API_KEY", "secret")
    with recite() as server:
        assert ask(server, CHAT, HELLO)[0] == 401
        assert ask(server, CHAT, HELLO, Authorization="Bearer secret")[0] == 200


def test_a_server_for_other_machines_needs_a_key_or_the_word_none(fails, monkeypatch):
    complaint = fails(serve.main, "--host=0.0.0.0")
    assert "set HUMPTYGPT_API_KEY or --api_key=FILE:path" in complaint
    assert serve.ServeConfig(host="0.0.0.0", api_key="none").validate() is None
    complaint = fails(serve.main, "--api_key=geheim")
    assert "FILE:path or none" in complaint and "geheim" not in complaint
    assert "cannot read missing" in fails(serve.main, "--api_key=FILE:missing")
    monkeypatch.setenv("HUMPTYGPT_API_KEY", "schlüssel")
    complaint = fails(serve.main)
    assert "key must be ASCII" in complaint and "schlüssel" not in complaint


def test_a_log_has_what_was_asked_and_answered_and_there_is_none_without_it(folder):
    with recite(log="log.jsonl") as server:
        answer = content(ask_well(server, CHAT, HELLO))
        chunks(server, CHAT, HELLO)
        ask(server, TEXT, {"prompt": "ä", "max_tokens": 3})
    first, second, third = map(json.loads, Path("log.jsonl").read_text().splitlines())
    assert first["messages"] == HELLO["messages"] and first["answers"] == [answer]
    assert first | second == first | {"time": second["time"]}
    assert third["prompt"] == "ä" and time.time() - third["time"] < 600
    Path("log.jsonl").unlink()
    with recite() as server:
        ask_well(server, CHAT, HELLO)
    assert not any(Path().iterdir())


# --------------------------------------------------------------------------------------
# Several clients


def request_of(body: dict, path: str = CHAT) -> bytes:
    content = json.dumps(HELLO | body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}"
    return f"{head}\r\n\r\n".encode() + content


def connect(server, body: dict) -> socket.socket:
    """Send a chat request without reading the answer."""
    connection = socket.create_connection(("127.0.0.1", server.server_port), timeout=30)
    connection.sendall(request_of(body))
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place_for_the_next(reciter, stream):
    gate, handlers = close_gate(reciter), handlers_of(reciter)
    leaving = connect(reciter, {"stream": stream})
    handler = handlers.get(timeout=20)
    if stream:
        gate.release()
        leaving.recv(100)
    leaving.close()
    answers = []
    waiting = threading.Thread(
        target=lambda: answers.append(content(ask_well(reciter, CHAT, HELLO)))
    )
    waiting.start()
    taken = 0
    while handler.is_alive() and taken < 20:
        gate.release()
        taken += 1
        handler.join(0.5)
    assert taken < 20  # of a longer reply
    open_gate(reciter)
    waiting.join(20)
    assert answers == [REPLY]


def test_a_short_answer_does_not_wait_for_the_end_of_a_long_one(reciter):
    gate, handlers = close_gate(reciter), handlers_of(reciter)
    first = connect(reciter, {"stream": True})
    gate.release()
    first.recv(100)
    second = connect(reciter, {"max_tokens": 3})
    handler = [handlers.get(timeout=20) for _ in range(2)][1]
    while reciter.computing._work_queue.empty():  # until the second one has asked
        handler.join(0.01)
    gate.release(10)  # tokens, of which the first one would need forty
    assert b"200 OK" in second.recv(100)
    open_gate(reciter)


def handlers_of(server) -> Queue:
    """The threads that will answer requests."""
    handlers, answer = Queue(), server.process_request_thread

    def process(*given) -> None:
        handlers.put(threading.current_thread())
        answer(*given)

    server.process_request_thread = process
    return handlers


@pytest.mark.parametrize("patience", [20, 0.2])
def test_a_client_that_does_not_read_holds_up_nobody_and_is_dropped_in_the_end(
    reciter, monkeypatch, patience
):
    monkeypatch.setattr(serve.Handler, "timeout", patience)
    # the system holds back little of an answer
    reciter.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    handlers = handlers_of(reciter)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        slow.connect(("127.0.0.1", reciter.server_port))
        slow.sendall(request_of({"logprobs": True, "top_logprobs": 20, "stream": True}))
        slow.recv(1)
        handler = handlers.get(timeout=20)
        if patience < 1:
            handler.join(20)
            assert not handler.is_alive()
        assert content(ask_well(reciter, CHAT, HELLO)) == REPLY
        if patience > 1:
            assert handler.is_alive()  # it still waits for the slow one


@pytest.mark.parametrize("written", [0, 2])
def test_an_error_of_the_model_is_500_or_within_a_stream_an_event_that_openais_client_raises(
    reciter, written, monkeypatch
):
    openai = pytest.importorskip("openai", reason="needs openai: pip install openai")
    model, compute = reciter.api.model, reciter.api.model.next_logits
    left = [None] * written

    def fail(idx):
        if not left:
            raise RuntimeError("out of memory\nat line 1")
        left.pop()
        return compute(idx)

    monkeypatch.setattr(model, "next_logits", fail)
    stream = {"stream": True} if written else {}
    with pytest.raises(openai.APIError, match="RuntimeError: out of memory") as raised:
        list(client_of(reciter).chat.completions.create(model="tiny", **stream, **HELLO))
    assert isinstance(raised.value, openai.InternalServerError) == (not written)
    left += [None] * written
    answer = raw(reciter, request_of({})).decode()
    body = json.loads(answer.partition("\r\n\r\n")[2])
    assert body["error"]["type"] == "server_error" and answer.count("HTTP/1.0") == 1
    monkeypatch.undo()
    assert content(ask_well(reciter, CHAT, HELLO)) == REPLY


@pytest.mark.parametrize("patience", [20, 0])
def test_a_client_that_sends_half_a_request_holds_up_nobody_and_is_dropped_in_the_end(
    reciter, monkeypatch, patience
):
    monkeypatch.setattr(serve, "PATIENCE", patience)
    with socket.create_connection(("127.0.0.1", reciter.server_port), timeout=30) as slow:
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n\r\n{"
        )
        if patience:
            assert content(ask_well(reciter, CHAT, HELLO)) == REPLY
        else:
            slow.recv(10**6)  # whatever the server says before it leaves


def test_at_the_limit_of_connections_or_descriptors_others_wait(reciter, monkeypatch):
    waits, counts = [], []
    errors = [OSError(errno.EMFILE, "Too many open files")] * 3
    accept = socketserver.TCPServer.get_request

    def get_request(server):
        counts.append(len(server.connections))
        if errors:
            raise errors.pop()
        return accept(server)

    monkeypatch.setattr(socketserver.TCPServer, "get_request", get_request)
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr(serve, "CONNECTIONS", 2)
    asked = [connect(reciter, {}) for _ in range(9)]
    for connection in asked:
        with connection:
            assert b"200 OK" in connection.recv(100)
    assert len(waits) >= 3 and max(counts) < 2


# --------------------------------------------------------------------------------------
# The script


@contextmanager
def started(folder: Path, run: str):
    """Run serve.py in a process of its own, until Ctrl-C. Yields the process and its port; nothing may fail in it."""
    argv = [sys.executable, str(ROOT / "serve.py"), f"--out_dir=out/{run}", "--port=0"]
    with (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            argv,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            # a shell lets what it runs in the background ignore Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            address = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
            yield process, int(address[1])
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
        finally:
            process.kill()
            process.stdout.close()
    assert "Traceback" not in (folder / "errors.txt").read_text()


SAID = [
    {
        "messages": [{"role": "user", "content": f"king {i}"}],
        "temperature": 0,
        "max_tokens": 15,
    }
    for i in range(5)
]


def misbehave(port: int, random: random.Random) -> None:
    """Send a request that is damaged, or leave before the answer is complete."""
    body = json.dumps(random.choice(SAID) | {"stream": random.random() < 0.5}).encode()
    kind = random.choice(["leaves", "damaged", "keys", "huge", "slow", "half"])
    if kind == "damaged":
        body = body[: random.randrange(1, len(body))]
    elif kind == "keys":
        body = body.replace(b"content", b"contents").replace(b"temper", b"tamper")
    elif kind == "huge":
        body = body + b" " * 2_000_000
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    request = head.encode() + body
    if kind == "half":
        request = request[: random.randrange(len(request))]
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        if kind == "slow":
            for byte in request:
                connection.send(bytes([byte]))
        else:
            connection.sendall(request)
        if kind not in ("slow", "half"):
            connection.recv(random.randrange(1, 2000))


def storm(port: int, expected: list[str], seed: int, rounds: int) -> list[str]:
    """Let twenty clients ask at once, every second of them badly. Returns what went wrong."""
    problems = []

    def run(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        for _ in range(rounds):
            try:
                if number % 2:
                    misbehave(port, chance)
                else:
                    i = chance.randrange(len(SAID))
                    found = content(ask_well(port, CHAT, SAID[i]))
                    assert found == expected[i]
            except Exception as error:
                problems.append(repr(error))

    clients = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(20)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(60)
        assert not client.is_alive()
    return problems


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.long)])
def test_twenty_clients_of_which_half_misbehave_get_right_answers_and_ctrl_c_ends_three(
    runs, rounds
):
    with ExitStack() as clients, started(runs, "chat") as (process, port):
        expected = [content(ask_well(port, CHAT, body)) for body in SAID]
        memory = psutil.Process(process.pid).memory_info
        assert storm(port, expected, 0, rounds) == []
        before = memory().rss
        assert storm(port, expected, 1, rounds) == []
        growth = memory().rss / before - 1
        print(f"memory: {before / 1e6:.1f} MB, {growth:+.2%}")
        assert growth < 0.05
        for _ in range(3):
            client = clients.enter_context(socket.create_connection(("127.0.0.1", port)))
            request = {"prompt": "king", "max_tokens": 4096, "n": 16, "stream": True}
            client.sendall(request_of(request, TEXT))
            client.recv(1)


def test_a_server_opens_a_run_that_has_replaced_its_own_once_that_has_ended(
    runs, capfd, monkeypatch
):
    monkeypatch.chdir(runs)
    shutil.copytree("out/chat", "out/again")
    best, metrics = Path("out/again/best.pt"), Path("out/again/metrics.jsonl")
    config = serve.ServeConfig(port=0)
    server = serve.listen(config, partial(serve.open_model, config, best, "again"), best)
    first = server.api
    assert first.name == "again"
    server.service_actions()
    assert server.api is first
    train.main(
        [
            *TINY_RUN,
            "--dataset=chats",
            "--block_size=128",
            "--out_dir=out/again",
            "--seed=5",
        ]
    )
    rows = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(rows[:-1]))  # as of a run that is still training
    server.service_actions()
    assert server.api is first
    metrics.write_text("".join(rows))
    server.service_actions()
    second = server.api
    assert second is not first
    new = server.api.model.state_dict()["wte.weight"]
    assert torch.equal(new, checkpoint.read(best)["model"]["wte.weight"])
    best.write_bytes(best.read_bytes()[:-1])
    server.service_actions()
    assert server.api is second and "still serving" in capfd.readouterr().err
    server.server_close()


def test_a_port_in_use_and_a_port_that_does_not_exist_are_one_line(
    runs, fails, monkeypatch
):
    monkeypatch.chdir(runs)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}" in last_line(
            fails, f"--port={port}"
        )
    assert "port must be 0-65535" in last_line(fails, "--port=99999")


def test_a_dtype_without_effect_is_refused(fails):
    low = ["--quantize=int8", "--dtype=bfloat16"]
    assert "dtype=bfloat16 has no effect" in last_line(fails, *low)


def last_line(fails, *argv: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "humptygpt.generation.generator.print",
            lambda *args, **keys: None,
            raising=False,
        )
        return fails(serve.main, "--out_dir=out/text", *argv)


@pytest.mark.usefixtures("pairs")
def test_a_model_that_translates_is_refused(fails, monkeypatch):
    train.main([*TINY_RUN, "--model=transformer", "--dataset=pairs", "--block_size=64"])
    monkeypatch.setattr(
        "humptygpt.generation.generator.print", lambda *args, **keys: None, raising=False
    )
    assert "translates; use sample.py" in fails(serve.main, "--out_dir=out/run")


# --------------------------------------------------------------------------------------
# lm-evaluation-harness


@pytest.mark.long
def test_lm_evaluation_harness_scores_a_served_model_as_score_py_does(
    folder, capsys, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval: pip install lm_eval")
    pytest.importorskip("tenacity", reason="needs lm_eval[api]: pip install lm_eval[api]")
    make_run(*CASES["llama, documents of bpe"])
    export.main(["--out_dir=out/run", "--to=exported"])  # for its tokenizer
    words = sorted(set(make_text(2000).split()))
    lines = [
        {"context": "", "choices": [f"{a} {b}", f"{b} {a}", f"{a} {a}."], "answer": i % 3}
        for i, (a, b) in enumerate(zip(words, words[::-1], strict=True))
        if a != b
    ]
    write_lines("pairs.jsonl", *lines)
    scores = []
    monkeypatch.setattr(
        pairs,
        "log_probabilities",
        lambda *given: scores.extend(texts.log_probabilities(*given)) or scores,
    )
    capsys.readouterr()
    argv = ["--out_dir=out/run", "--pairs=pairs.jsonl", "--json=True"]
    row = json.loads(scored(capsys, *argv))[-1]
    task = lm_eval_task(folder / "pairs.jsonl", "acc")
    with serving(sample.load("out/run")) as server:
        found = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": "tiny",
                "base_url": f"http://127.0.0.1:{server.server_port}/v1/completions",
                "tokenizer_backend": "huggingface",
                "tokenizer": str(folder / "exported"),
                "max_length": server.api.block_size,
                "max_retries": 1,
            },
            tasks=[task],
            bootstrap_iters=0,
        )
    assert found["results"]["pairs"]["acc,none"] == pytest.approx(row["sum"])
    samples = sorted(found["samples"]["pairs"], key=lambda each: each["doc_id"])
    theirs = [answer[0] for each in samples for answer in each["filtered_resps"]]
    ours = [each.sum() for each in scores]
    assert len(ours) == len(theirs) == 3 * len(lines) > 60
    print(f"largest difference: {np.abs(np.subtract(ours, theirs)).max():.2e}")
    assert theirs == pytest.approx(ours, abs=1e-4)
