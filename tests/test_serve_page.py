"""The page of serve.py in a real browser: what it streams and shows, and what can be done with it, by any hand.

Needs Chromium (Debian: apt-get install chromium) and the packages playwright and axe-playwright-python.
"""

import re

import pytest
import torch
from test_serve import REPLY, Reciter, close_gate, open_gate, recite, serving

import sample
from humptygpt.tokenizers.basic import ByteTokenizer, CharTokenizer
from humptygpt.tokenizers.chat import ChatTokenizer, Turn

pytestmark = pytest.mark.page


@pytest.fixture
def reciter():
    with recite() as server:
        yield server
        open_gate(server)


@pytest.fixture
def writer():
    """A server of a text model that recites REPLY from the first letter on."""
    tokenizer = ByteTokenizer(separated=True)
    tokenizer.begin = -1
    pipeline = sample.Pipeline(Reciter(tokenizer, shift=1), tokenizer, "language modelling", torch.device("cpu"))
    with serving(pipeline) as server:
        yield server
        open_gate(server)


@pytest.fixture
def opened(browser):
    """Opens a server's page. It may ask for nothing but its server, and its console must stay empty."""
    contexts, console, requests = [], [], []

    def open_page(server, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: console.append(message.text))
        page.on("pageerror", lambda error: console.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        url = f"http://127.0.0.1:{server.server_port}/"
        page.goto(url)
        make_ready(page)
        page.own = url
        return page

    yield open_page
    pages = [page for context in contexts for page in context.pages]
    for context in contexts:
        context.close()
    assert console == []
    assert all(url.startswith(tuple(page.own for page in pages)) for url in requests)


def make_ready(page) -> None:
    page.wait_for_selector("#message[placeholder]")
    page.fill("#temperature", "0")  # the reciter then makes no mistake
    page.focus("#message")


def say(page, text: str = "Hello") -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def replies(page) -> list[str]:
    """The texts of the replies, without the mark of their end."""
    script = """(cards) => cards.map((card) =>
      [...card.querySelectorAll("p:first-child .token:not(.end)")].map((token) => token.textContent).join(""))"""
    return page.eval_on_selector_all("article.assistant, article.text", script)


def wait_for_reply(page, text: str = REPLY, index: int = 0) -> None:
    """Wait until a reply is this text."""
    script = """([text, index]) => {
      const card = document.querySelectorAll(".assistant, .text")[index];
      return card && [...card.querySelectorAll("p:first-child .token:not(.end)")]
        .map((token) => token.textContent).join("") === text;
    }"""
    page.wait_for_function(script, arg=[text, index])


def wait_until_done(page) -> None:
    page.wait_for_selector("#stop:disabled")


def press(page, name: str) -> None:
    """Click the first button of this name."""
    page.get_by_role("button", name=name, exact=True).first.click()


def token(page, text: str, nth: int = 0):
    return page.locator(".token", has_text=re.compile(f"^{re.escape(text)}$")).nth(nth)


def test_a_reply_appears_token_by_token_and_its_characters_whole(reciter, opened):
    page = opened(reciter)
    gate = close_gate(reciter)
    say(page)
    gate.release(3)  # G, r, and the first byte of ü
    wait_for_reply(page, "Gr")
    gate.release(1)
    wait_for_reply(page, "Grü")
    open_gate(reciter)
    wait_until_done(page)
    assert replies(page) == [REPLY]
    assert page.locator("[role=status]").inner_text() == REPLY.replace("\n", " ")
    assert page.locator("article b").count() == 0


def test_the_newest_reply_ends_above_the_input(reciter, opened):
    page = opened(reciter, viewport={"width": 390, "height": 500})
    for i in range(3):
        say(page)
        wait_for_reply(page, index=i)
        wait_until_done(page)
        ends = "[...document.querySelectorAll('article')].at(-1).getBoundingClientRect().bottom"
        footer = "document.querySelector('footer').getBoundingClientRect().top"
        assert page.evaluate(f"{ends} <= {footer}")


@pytest.mark.parametrize("by", ["button", "key"])
def test_a_reply_that_is_stopped_within_a_word_stays_and_can_be_continued(reciter, opened, by):
    page = opened(reciter)
    gate = close_gate(reciter)
    say(page)
    gate.release(4)
    wait_for_reply(page, "Grü")
    if by == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    wait_until_done(page)
    open_gate(reciter)
    assert replies(page) == ["Grü"]
    press(page, "Continue")
    wait_for_reply(page)
    wait_until_done(page)
    press(page, "Again")
    wait_until_done(page)
    wait_for_reply(page)


def test_a_token_shows_its_probability_and_the_five_likeliest_as_pytorch_computes_them(reciter, opened):
    page = opened(reciter)
    say(page)
    wait_until_done(page)
    api = reciter.api
    ids = [
        *api.tokenizer.encode_turns([Turn("user", "Hello")], reply=True).tolist(),
        ord("G"),
    ]
    probabilities = api.model(torch.tensor([ids]))[0][0, -1].softmax(-1)
    token(page, "r").click()
    rows = page.locator(".likeliest li").all_inner_texts()
    likeliest = probabilities.topk(5).values.tolist()
    shown = [float(re.search(r"([\d.]+)\s%", row)[1]) / 100 for row in rows]
    assert shown == pytest.approx(likeliest, abs=6e-4) and len(shown) == 5
    assert "“r”" in rows[0]
    chance = f"{100 * probabilities[ord('r')]:.1f}"
    assert f"“r” had a probability of {chance}" in page.inner_text(".likeliest .note")


def test_choosing_another_token_continues_from_there_and_every_byte_of_a_character_can_be_chosen(reciter, opened):
    page = opened(reciter)
    say(page)
    wait_until_done(page)
    token(page, "r").click()
    other = page.locator(".likeliest li button").nth(1)
    letter = other.locator("code").inner_text().strip("“”")
    other.click()
    wait_until_done(page)
    expected = f"G{letter}{REPLY[2:]}"
    wait_for_reply(page, expected)
    token(page, "ü").click()
    titles = page.locator(".likeliest .note").all_inner_texts()
    assert [title.split(" had")[0] for title in titles] == [r"“\xc3”", r"“\xbc”"]
    assert page.locator(".likeliest li").count() == 10
    page.locator(".end").click()
    page.locator(".likeliest li button").nth(1).click()  # the reply does not end there
    wait_until_done(page)
    assert replies(page)[0].startswith(expected) and len(replies(page)[0]) > len(expected)


def test_a_message_can_be_edited_and_what_followed_it_is_replaced(reciter, opened):
    page = opened(reciter)
    say(page, "One")
    wait_until_done(page)
    say(page, "Two")
    wait_until_done(page)
    press(page, "Edit")
    assert page.input_value("#message") == "One"
    page.keyboard.press("Escape")
    assert page.input_value("#message") == "" and len(replies(page)) == 2
    press(page, "Edit")
    say(page, "Three")
    wait_until_done(page)
    assert page.locator(".user p").all_inner_texts() == ["Three"]
    assert replies(page) == [REPLY]


def test_a_conversation_survives_a_reload_also_while_it_is_written(reciter, opened):
    page = opened(reciter)
    say(page)
    wait_until_done(page)
    gate = close_gate(reciter)
    say(page, "<img src=x onerror=alert(1)>")
    gate.release(4)
    wait_for_reply(page, "Grü", 1)
    page.reload()
    make_ready(page)
    assert replies(page) == [REPLY, "Grü"]
    assert page.locator(".user p").last.inner_text() == "<img src=x onerror=alert(1)>"
    assert page.locator("article img").count() == 0
    press(page, "New")
    assert replies(page) == []


def test_when_the_context_is_full_the_oldest_exchanges_are_forgotten(browser):
    with recite(block_size=150) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}")
        make_ready(page)
        for number in range(3):
            say(page, f"Number {number}")
            wait_until_done(page)
        assert replies(page) == [REPLY] * 3
        assert page.locator("text=no longer sees the conversation up to here").count() == 1
        say(page, "x" * 200)
        wait_until_done(page)
        assert "the prompt takes 219 tokens" in page.locator(".note").last.inner_text()
        context.close()


def test_a_server_that_has_gone_is_reported_and_the_page_can_go_on(reciter, opened, browser):
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{reciter.server_port}")
    make_ready(page)
    context.set_offline(True)
    say(page)
    wait_until_done(page)
    assert "does not answer" in page.inner_text("article .note")
    context.set_offline(False)
    press(page, "Again")
    wait_for_reply(page)
    context.close()


def test_a_text_model_continues_a_text_and_then_itself(writer, opened):
    page = opened(writer)
    assert page.inner_text("#send") == "Write"
    gate = close_gate(writer)
    say(page, REPLY[:3])
    gate.release(2)
    wait_for_reply(page, REPLY[3:4])
    page.click("#stop")
    wait_until_done(page)
    open_gate(writer)
    press(page, "Continue")
    wait_until_done(page)
    assert replies(page) == [REPLY[3:]] and page.inner_text("article p").startswith(REPLY)


@pytest.mark.parametrize("task", ["chat", "language modelling"])
def test_a_character_that_the_model_does_not_know_is_struck_through_and_not_sent(opened, task):
    alphabet = "".join(sorted({*REPLY, *"\nHeluasrint"}))
    tokenizer = CharTokenizer(alphabet, separated=True)
    if task == "chat":
        tokenizer = ChatTokenizer(tokenizer)
    else:
        tokenizer.begin = -1
    model = Reciter(tokenizer, shift=int(task != "chat"))
    pipeline = sample.Pipeline(model, tokenizer, task, torch.device("cpu"))
    with serving(pipeline) as server:
        page = opened(server)
        say(page, "G☕😀")
        wait_for_reply(page, REPLY if task == "chat" else REPLY[1:])
        wait_until_done(page)
        assert page.locator("s").all_inner_texts() == ["☕", "😀"]


def test_the_keyboard_is_enough(reciter, opened):
    page = opened(reciter)
    key = page.keyboard.press
    page.keyboard.type("Hello")
    key("Enter")
    wait_until_done(page)
    for _ in range(20):
        if page.evaluate("document.activeElement.className") == "token":
            break
        key("Shift+Tab")
    assert page.evaluate("document.activeElement.textContent") == "G"
    key("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "r"
    key("Enter")
    assert page.evaluate("document.activeElement.closest('.likeliest') !== null")
    key("Escape")
    assert page.evaluate("document.activeElement.textContent") == "r"
    key("Space")
    key("Tab")
    key("Enter")  # the second of the five
    wait_until_done(page)
    assert replies(page)[0][0] == "G" and replies(page)[0][1] != "r"
    assert page.evaluate("document.activeElement !== document.body")


@pytest.mark.parametrize("scheme, width", [("light", 390), ("dark", 1200)])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_window(reciter, opened, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    size = {"width": width, "height": 800}
    page = opened(reciter, color_scheme=scheme, viewport=size)
    for text in ("Hello", "W" * 300):
        say(page, text)
        wait_until_done(page)
    token(page, "r").click()
    wanted = {"resultTypes": ["violations"]}
    found = axe.Axe().run(page, options=wanted).response["violations"]
    assert [each["id"] for each in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", background)[:3])) > 380
    assert light == (scheme == "light")
