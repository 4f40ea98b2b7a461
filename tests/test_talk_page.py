"""The page of a chat run in a real browser, offline: it talks, and each token of a reply leads to its sum.

Needs Chromium (Debian: apt-get install chromium) and the packages playwright and axe-playwright-python.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import TINY_RUN
from test_chat import chat, write_chats
from test_explain import rounded
from test_explain_page import Opened, assert_axe_finds_nothing
from test_serve_page import press, replies, say, token, wait_until_done
from uncached import generate

import explain
import prepare_data
import train
from humptygpt.formats import load as loading
from humptygpt.tokenizers.chat import BEGIN, END, ChatTokenizer, Turn
from humptygpt.training import run as run_module

pytestmark = pytest.mark.page
WHOLE = "The wall is high, and I am well."  # so long and frequent that it becomes one token
WORDS = ["wall", "king", "egg", "horse", "men", "sat", "fall"]
KEYS = ["--block_size=64", "--position=rotary", "--learning_rate=0.01", "--max_iters=90"]
KEYS += ["--eval_interval=90", "--eval_iters=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of two chat runs and their pages: of byte pairs with a reply that is one token, and of characters."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(run_module, "draw_losses", lambda *args: None)
        exchanges = [
            (f"{word} {i % 9}", WHOLE if word == "wall" else f"a {word}!") for i in range(40) for word in WORDS
        ]
        write_chats(*(chat(*exchange) for exchange in exchanges))
        for name, data in {"humpty_egg": [], "chars": ["--tokenizer=char"]}.items():
            prepare_data.main(["--input=chats.jsonl", f"--name={name}", *data])
            keys = [f"--dataset={name}", f"--out_dir=out/{name}", *KEYS]
            train.main([*TINY_RUN, *keys])
            explain.main([f"--out_dir=out/{name}"])
    return folder


class Run(NamedTuple):
    model: torch.nn.Module  # with the weights of the page
    tokenizer: ChatTokenizer


@pytest.fixture(scope="module")
def loaded(runs):
    def load(name: str = "humpty_egg") -> Run:
        run = loading.load(runs / "out" / name)
        return Run(rounded(run.model, std=None), run.tokenizer)

    return load


@pytest.fixture
def opened(browser, runs):
    """Opens the page of a run. It may ask for nothing but itself, and its console must stay empty."""
    made = []

    def open_page(run: str = "humpty_egg", **options) -> Opened:
        view = Opened(browser, runs / "out" / run / "explain.html", **options)
        made.append(view)
        view.page.fill("#temperature", "0")
        return view

    yield open_page
    for each in made:
        each.context.close()
        others = [url for url in each.requests if not url.startswith("blob:")]
        assert each.console == [] and len(set(others)) == 1


def prompt_of(run: Run, *said: str) -> list[int]:
    """The tokens of a conversation up to its next reply."""
    roles = ["user", "assistant"] * len(said)
    turns = map(Turn, roles, said)
    return run.tokenizer.encode_turns(turns, reply=True).tolist()


def answer(run: Run, ids: list[int]) -> str:
    """The greedy reply to a prompt, or the rest of one that has begun."""
    room = run.model.config.block_size - len(ids)
    (new,) = generate(run.model, [ids], room, run.tokenizer.vocab_size, temperature=0)
    return run.tokenizer.decode(new).partition(END)[0]


def ask(view: Opened, text: str) -> str:
    """Say something, and return the whole reply."""
    say(view.page, text)
    wait_until_done(view.page)
    return replies(view.page)[-1]


def test_greedy_replies_are_those_of_the_model_turn_by_turn(opened, loaded):
    run, view = loaded(), opened()
    said = []
    for question in ("wall 3", "king 5"):
        said.append(question)
        expected = answer(run, prompt_of(run, *said))
        assert ask(view, question) == expected != ""
        said.append(expected)
    assert said[1] == WHOLE and len(said[3]) > 3
    # the reply that is one token is shown as one
    assert view.page.locator(".token").first.inner_text() == WHOLE


def test_a_token_shows_its_probability_and_another_one_can_be_chosen(opened, loaded):
    run, view = loaded(), opened()
    ask(view, "king 5")
    ids = prompt_of(run, "king 5")
    with torch.no_grad():
        logits = run.model(torch.tensor([ids]))[0][0, -1]
    probs = logits[: run.tokenizer.vocab_size].softmax(-1)
    view.page.locator(".token").first.click()
    rows = view.page.locator(".likeliest li button")
    shown = [float(re.search(r"([\d.]+)\s%", row)[1]) for row in rows.all_inner_texts()]
    assert shown == pytest.approx((100 * probs.topk(5).values).tolist(), abs=0.051)
    other = probs.topk(2).indices[1].item()
    rows.nth(1).click()
    wait_until_done(view.page)
    first = run.tokenizer.decode([other])
    assert replies(view.page) == [first + answer(run, [*ids, other])]


def test_a_token_leads_to_its_sum_and_back_leads_to_the_conversation(opened, loaded):
    run, view = loaded(), opened()
    ask(view, "wall 3")
    reply = ask(view, "king 5")
    ids = prompt_of(run, "wall 3", WHOLE, "king 5")
    tokens = [*run.tokenizer.encode(reply).tolist(), run.tokenizer.eot]
    view.page.locator("#talk .end").last.click()
    press(view.page, "How it was computed")
    view.settle()
    state = view.state()
    assert state["ids"] == [*ids, *tokens[:-1]]
    assert state["text"] == run.tokenizer.decode(state["ids"]) != ""
    assert state["text"].startswith(f"{BEGIN}user\nwall 3{END}\n{BEGIN}assistant\n{WHOLE}")
    assert state["t"] == len(state["ids"]) - 1 and not view.page.is_visible("#talk")
    with torch.no_grad():
        logits = run.model(torch.tensor([state["ids"]]))[0][0, -1]
    expected = logits[: run.tokenizer.vocab_size].softmax(-1)[tokens[-1]].item()
    value = view.page.locator("#arithmetic .value").get_attribute("data-value")
    assert float(value) == pytest.approx(expected, abs=1e-6)
    assert END in view.page.inner_text("#arithmetic h3")
    view.page.go_back()
    view.page.wait_for_selector("#talk article")
    assert replies(view.page) == [WHOLE, reply]


def test_nothing_of_the_page_below_shows_through_and_its_field_is_at_the_last_token(opened):
    view = opened(viewport={"width": 390, "height": 844})
    page = view.page.locator("#page")
    assert page.evaluate("it => getComputedStyle(it).visibility") == "hidden"
    for question in ("wall 3", "king 5", "egg 1"):
        ask(view, question)
    view.page.get_by_role("button", name="See how it computes").click()
    assert page.evaluate("it => getComputedStyle(it).visibility") == "visible"
    view.settle()
    end = "it => [it.scrollTop > 0, it.scrollHeight - it.clientHeight - it.scrollTop < 2]"
    assert view.page.locator("#text").evaluate(end) == [True, True]


def test_the_rest_of_the_page_shows_the_conversation_and_a_chip_leads_back(opened, loaded):
    run, view = loaded(), opened()
    reply = ask(view, "king 5")
    press(view.page, "See how it computes")
    ids = [*prompt_of(run, "king 5"), *run.tokenizer.encode(reply).tolist()]
    assert view.state()["ids"] == ids  # what it computes is the end
    view.page.reload()
    assert view.state()["ids"] == ids and not view.page.is_visible("#talk")
    press(view.page, "Talk")
    assert replies(view.page) == [reply]
    assert view.page.evaluate("document.activeElement.id") == "message"
    view.page.reload()
    view.page.wait_for_selector("#talk article")


def test_it_opens_with_its_name_and_questions_that_it_can_answer(opened, runs, loaded):
    run, view = loaded(), opened()
    assert view.page.title() == view.page.inner_text("#talk h1") == "Humpty egg"
    questions = view.page.locator("#talk main .tools button").all_inner_texts()
    lines = Path(runs, "chats.jsonl").read_text()
    assert len(questions) == 4 and all(f'"{text}"' in lines for text in questions)
    press(view.page, questions[1])
    wait_until_done(view.page)
    assert view.page.inner_text(".user p") == questions[1]
    assert replies(view.page) == [answer(run, prompt_of(run, questions[1]))]
    assert view.page.locator("#talk main .tools button").all_inner_texts() == [
        "Edit",
        "Again",
    ]


def test_an_unknown_character_is_struck_through_and_not_read(opened, loaded):
    run, view = loaded("chars"), opened("chars")
    assert ask(view, "k☕ing😀 5") == answer(run, prompt_of(run, "king 5"))
    assert view.page.locator("#talk s").all_inner_texts() == ["☕", "😀"]


def test_what_does_not_fit_is_said_and_nothing_is_not_sent(opened, loaded):
    run, view = loaded(), opened()
    say(view.page, " \n ")
    assert view.page.locator("#talk article").count() == 0
    ask(view, "x" * 20_000)
    length = len(prompt_of(run, "x" * 20_000))
    assert f"This takes {length} tokens, and the context has 64" in view.page.inner_text("#talk article .note")
    press(view.page, "New")
    assert ask(view, "king 5") == answer(run, prompt_of(run, "king 5"))


def test_the_oldest_exchanges_are_forgotten_when_the_context_is_full(opened, loaded):
    run, view = loaded(), opened()
    said, forgotten = [], 0
    for number in range(8):
        said.append(f"king {number}")
        while len(prompt_of(run, *said[forgotten:])) >= 64:
            forgotten += 2
        said.append(answer(run, prompt_of(run, *said[forgotten:])))
        assert ask(view, said[-2]) == said[-1]
    assert forgotten > 2
    assert view.page.locator("text=no longer sees the conversation up to here").count() == 1


HOLD = """() => {
  const own = Desk.prototype.ask;
  Desk.prototype.ask = async function (topic, message) {
    if (topic === "reply" && message.ids.length === 2) await new Promise((go) => (window.go = go));
    return own.call(this, topic, message);
  };
}"""


def test_escape_stops_it_while_it_writes_and_it_can_go_on(opened, loaded):
    run, view = loaded(), opened()
    view.page.evaluate(HOLD)
    say(view.page, "king 5")
    view.until("window.go !== undefined")
    (begun,) = replies(view.page)
    view.page.keyboard.press("Escape")
    view.page.evaluate("go()")
    wait_until_done(view.page)
    whole = answer(run, prompt_of(run, "king 5"))
    assert replies(view.page) == [begun] and whole.startswith(begun) and whole != begun
    view.page.evaluate("window.go = undefined")
    press(view.page, "Continue")
    view.until("window.go !== undefined")
    view.page.evaluate("go()")
    wait_until_done(view.page)
    assert replies(view.page) == [whole]


@pytest.mark.parametrize("scheme, width", [("light", 390), ("dark", 1200)])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_window(opened, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    view = opened(color_scheme=scheme, viewport={"width": width, "height": 800})
    assert_axe_finds_nothing(axe, view)
    ask(view, "king 5")
    ask(view, "W" * 300)
    token(view.page, "a").click()
    assert_axe_finds_nothing(axe, view)
    for element in ("document.documentElement", "document.getElementById('talk')"):
        wide, room = view.page.evaluate(f"[{element}.scrollWidth, {element}.clientWidth]")
        assert 0 < wide <= room
    press(view.page, "How it was computed")
    view.settle()
    assert_axe_finds_nothing(axe, view, "#top, #sections-part, #drawer")
