"""serve.py: OpenAI's API over one model, whoever asks, and however."""

import http.client
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import Empty, Queue
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, TINY_RUN, WITHOUT_SAMPLE
from test_chat import chat, write_chats
from texts import make_text
from torch import nn

import prepare_data
import sample
import serve
import train
from humptygpt.page.html import fill
from humptygpt.server import web
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
    config = serve.ServeConfig(**{"port": 0} | keys)
    api = Api(pipeline, name, config.log)
    names = [name.lower() for name in config.allowed_hosts]
    app = web.Web(api, fill("chat.html"), names, config.key)
    server = web.Server(app)
    logging.getLogger("uvicorn.access").handlers.clear()
    with serve.listen(config) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        try:
            yield SimpleNamespace(api=api, app=app, server_port=port, loaded=pipeline)
        finally:
            server.should_exit = True
            thread.join(30)


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
    with serving(sample.load(runs / "out/text")) as server:
        yield server


@pytest.fixture(scope="module")
def served_chat(runs):
    with serving(sample.load(runs / "out/chat")) as server:
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
    *parts, last = client.chat.completions.create(**keys, **counted, max_completion_tokens=40)
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
    answer = client.completions.create(prompt="Ak", **keys)
    assert "Ak" + answer.choices[0].text == expected and len(expected) == 102 > 64
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 100
    stream = client.completions.create(prompt=["Ak"], n=1, stream=True, **keys)
    assert "Ak" + "".join(part.choices[0].text for part in stream) == expected
    begun = served_text.loaded.tokenizer.encode(expected[2:30]).tolist()
    rest = {"prompt": "Ak", "reply_tokens": begun, "max_tokens": 20, "temperature": 0}
    (answer,) = ask_well(served_text, TEXT, rest)["choices"]
    assert answer["text"] == expected[30:50]


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
    same = said(("system", "Be brief."), ("user", "king\n3"), ("assistant", ""), ("user", "wall"))
    given, plain = (ask_well(served_chat, CHAT, request) for request in (sent, same))
    assert (given["usage"], content(given)) == (plain["usage"], content(plain))


def test_a_longer_answer_than_there_is_room_for_and_any_seed_are_allowed(reciter):
    answer = ask_well(reciter, CHAT, HELLO | {"max_tokens": 10**9, "seed": -1})
    assert content(answer) == REPLY


def test_clients_that_send_what_asks_for_nothing_get_an_answer(reciter):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}}
    neutral |= {"response_format": {"type": "text"}, "modalities": ["text"], "suffix": None}
    for choice in ("auto", "none"):
        keys = neutral | {"tool_choice": choice, "function_call": choice, "user": "me"}
        assert content(ask_well(reciter, CHAT, HELLO | keys)) == REPLY


def test_a_conversation_too_long_has_the_code_by_which_programs_know_it():
    with recite(block_size=100) as server:
        status, answer = ask(server, CHAT, said(("user", "a" * 90)))
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_the_model_and_the_servers_health_have_addresses(reciter):
    (entry,) = ask(reciter, "/v1/models?limit=1", method="GET")[1]["data"]
    assert type(entry["created"]) is int
    assert ask(reciter, "/v1/models/tiny", method="GET") == (200, entry)
    assert ask(reciter, "/v1/models/big", method="GET")[0] == 404
    assert ask(reciter, "/health", method="GET") == (200, {"status": "ok"})
    assert raw(reciter, b"HEAD /health HTTP/1.1\r\n" + HOST + b"\r\n") == (200, b"")
    assert raw(reciter, b"GET /health HTTP/1.0\r\n\r\n")[0] == 200  # as probes ask


def test_without_a_seed_two_answers_differ(served_text):
    request = {"prompt": "Ak", "max_tokens": 60, "temperature": 1.5}
    answers = [ask_well(served_text, TEXT, request)["choices"] for _ in range(2)]
    assert answers[0] != answers[1]
    seeded = [ask_well(served_text, TEXT, request | {"seed": 0})["choices"] for _ in "12"]
    assert seeded[0] == seeded[1]


def test_characters_arrive_whole_although_each_of_their_bytes_is_a_token(reciter):
    parts = chunks(reciter, CHAT, HELLO | {"logprobs": True, "top_logprobs": 5})
    pieces = [part["choices"][0]["delta"]["content"] for part in parts]
    assert "".join(pieces) == REPLY and "ü" in pieces and "🥚" in pieces
    entries = [x for part in parts for x in (part["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert bytes(byte for entry in entries[:-1] for byte in entry["bytes"]) == REPLY.encode()
    assert [entry["token"] for entry in entries[2:4]] == [r"\xc3", r"\xbc"]
    assert all(entry == {**entry["top_logprobs"][0], "top_logprobs": entry["top_logprobs"]} for entry in entries)
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
    "messages[0].content[0].type must be text": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "text is missing": {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    "messages[0].role must be assistant or": {"messages": [{"role": "x", "content": ""}]},
    "temperature=-1 must be at least 0": HELLO | {"temperature": -1},
    "temperature must be float": HELLO | {"temperature": "hot"},
    "top_p=0 must be above 0": HELLO | {"top_p": 0},
    "stop must not be empty": HELLO | {"stop": ["a", ""]},
    "stop must not be": HELLO | {"stop": ""},
    "max_tokens must be an int from 0": HELLO | {"max_tokens": -1},
    "n must be an int from 1 to 1": HELLO | {"n": 2},
    "min_p=-0.1 must be at least 0": HELLO | {"min_p": -0.1},
    "response_format is not supported": HELLO | {"response_format": {"type": "json_object"}},
    "tool_choice is not supported": HELLO | {"tool_choice": "required"},
    "repetition_penalty=0 must be above 0": HELLO | {"repetition_penalty": 0},
    "frequency_penalty is not supported": HELLO | {"frequency_penalty": 0.5},
    "presence_penalty is not supported": HELLO | {"presence_penalty": -1},
    "stream_options.include_usage must be bool": HELLO | {"stream_options": {"include_usage": 1}},
    "stop must be str or list": HELLO | {"stop": 1},
    "logprobs must be bool": HELLO | {"logprobs": 5},
    "top_logprobs must be an int from 0 to 20": HELLO | {"top_logprobs": 21},
    "stream must be bool": HELLO | {"stream": "yes"},
    "must be an int from 0 to 258": HELLO | {"reply_tokens": [259]},
    "the prompt takes 419 tokens, and the model's context has 400": {
        "messages": [{"role": "user", "content": "x" * 400}]
    },
    "messages is empty": {"messages": []},
    "the text has '\\ud800', which is half": {"messages": [{"role": "user", "content": "\ud800"}]},
    "Expecting": b'{"messages": [',
    "temperature=nan must be at least 0": b'{"messages": [], "temperature": NaN}',
    "top_p=inf must be": b'{"messages": [], "top_p": 1e999}',
    "line 1 column 1": b"",
    "at most 1,000,000 bytes": b" " * 2_000_000,
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
    "prompt[0] must be str": {"prompt": [1, 2]},
    "there are several prompts": {"prompt": ["one", "two"]},
    "the prompt takes 64 tokens, and the model's context has 64": {"prompt": "A" * 64},
    "character 'é' (U+00E9)": {"prompt": "é"},
    "echo is not supported": {"prompt": "A", "echo": True},
    "logprobs must be bool": {"prompt": "A", "logprobs": 5},
    "is not a chat model": HELLO,
}


@pytest.mark.parametrize("message", BAD_PROMPTS)
def test_a_bad_text_request_is_an_error_in_openais_form(served_text, message):
    path = CHAT if "messages" in BAD_PROMPTS[message] else TEXT
    status, answer = ask(served_text, path, BAD_PROMPTS[message])
    assert status == 400 and message in answer["error"]["message"]
    assert ask_well(served_text, TEXT, {"prompt": "A"})


def raw(server, request: bytes) -> tuple[int, bytes]:
    """Send bytes and no more. Returns the status of the answer and its body."""
    address = ("127.0.0.1", server.server_port)
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(request)
        answer = b"".join(iter(lambda: connection.recv(10**6), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


HOST = b"Host: localhost\r\nConnection: close\r\n"
RAW = {
    "no body": (400, b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"\r\n"),
    "path": (404, b"POST /v1/nothing HTTP/1.1\r\n" + HOST + b"\r\n"),
    "page": (404, b"GET /etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n"),
    "address": (404, b"GET http://[bad/v1 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "origin": (403, b"GET / HTTP/1.1\r\nOrigin: http://[bad\r\n" + HOST + b"\r\n"),
    "method": (405, b"PUT / HTTP/1.1\r\n" + HOST + b"\r\n"),
}
MALFORMED = {
    "length": b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Length: x\r\n\r\n{}",
    "negative": b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Length: -5\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "line": b"GET /" + b"a" * 70_000,
    "headers": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
    "words": b"hello\r\n\r\n",
}


@pytest.mark.parametrize("kind", RAW)
def test_a_request_that_asks_for_nothing_there_is_gets_an_error_in_openais_form(reciter, kind):
    status, body = raw(reciter, RAW[kind][1])
    assert status == RAW[kind][0] and json.loads(body)["error"]["message"]


@pytest.mark.parametrize("kind", MALFORMED)
def test_what_is_no_http_is_refused_and_others_are_answered(reciter, kind):
    assert raw(reciter, MALFORMED[kind])[0] == 400
    assert content(ask_well(reciter, CHAT, HELLO)) == REPLY


@pytest.mark.parametrize("status, size", [(200, 0), (400, 2_000_000)])
def test_a_body_in_chunks_is_read_and_has_the_same_limit(reciter, status, size):
    connection = http.client.HTTPConnection("127.0.0.1", reciter.server_port, timeout=30)
    body = json.dumps(HELLO).encode() + b" " * size
    chunks = (body[i : i + 50_000] for i in range(0, len(body), 50_000))
    connection.request("POST", CHAT, chunks, encode_chunked=True)
    assert connection.getresponse().status == status
    connection.close()


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
    assert first["messages"] == HELLO["messages"] and first["answer"] == answer
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


def ends_of(server) -> Queue:
    """Has an entry for each answer that has ended."""
    ended, answer = Queue(), server.api.answer

    def answer_and_tell(*given) -> Iterator[str]:
        try:
            yield from answer(*given)
        finally:
            ended.put(True)

    server.api.answer = answer_and_tell
    return ended


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place_for_the_next(reciter, stream):
    gate, ended = close_gate(reciter), ends_of(reciter)
    leaving = connect(reciter, {"stream": stream})
    if stream:
        gate.release()
        leaving.recv(100)
    leaving.close()
    for _ in range(20):  # tokens, fewer than its reply has
        gate.release()
        with suppress(Empty):
            assert ended.get(timeout=0.5)
            break
    else:
        pytest.fail("the reply goes on")
    open_gate(reciter)
    assert content(ask_well(reciter, CHAT, HELLO)) == REPLY


def test_a_short_answer_does_not_wait_for_the_end_of_a_long_one(reciter):
    gate, asked, next_part = close_gate(reciter), Queue(), reciter.app.next_part
    reciter.app.next_part = lambda parts: asked.put(True) or next_part(parts)
    first = connect(reciter, {"stream": True})
    gate.release()
    first.recv(100)
    second = connect(reciter, {"max_tokens": 3})
    for _ in range(3):  # two parts of the first, and one of the second
        asked.get(timeout=20)
    gate.release(10)  # tokens, of which the first one would need forty
    assert b"200 OK" in second.recv(100)
    open_gate(reciter)


def test_a_client_that_does_not_read_holds_up_nobody(reciter):
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        slow.connect(("127.0.0.1", reciter.server_port))
        slow.sendall(request_of({"logprobs": True, "top_logprobs": 20, "stream": True}))
        slow.recv(1)
        assert content(ask_well(reciter, CHAT, HELLO)) == REPLY


def test_a_client_that_sends_half_a_request_holds_up_nobody(reciter):
    with connect(reciter, {}) as slow:
        slow.sendall(request_of({})[:-1])
        assert content(ask_well(reciter, CHAT, HELLO)) == REPLY


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
    status, answer = ask(reciter, CHAT, HELLO)
    assert answer["error"]["type"] == "server_error" and status == (200 if written else 500)
    monkeypatch.undo()
    assert content(ask_well(reciter, CHAT, HELLO)) == REPLY


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
def test_twenty_clients_of_which_half_misbehave_get_right_answers_and_ctrl_c_ends_three(runs, rounds):
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
            request = {"prompt": "king", "max_tokens": 4096, "stream": True}
            client.sendall(request_of(request, TEXT))
            client.recv(1)


def test_a_port_in_use_and_a_port_that_does_not_exist_are_one_line(runs, fails, monkeypatch):
    monkeypatch.chdir(runs)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}" in last_line(fails, f"--port={port}")
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
    monkeypatch.setattr("humptygpt.generation.generator.print", lambda *args, **keys: None, raising=False)
    assert "translates; use sample.py" in fails(serve.main, "--out_dir=out/run")
