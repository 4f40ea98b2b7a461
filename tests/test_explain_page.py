"""The page of a run in a real browser, offline: what it shows is PyTorch's, and hands that have no mouse can use it.

Needs Chromium (Debian: apt-get install chromium) and the packages playwright and axe-playwright-python.
"""

import io
import random
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import PLAIN, TINY_RUN, WITHOUT_SAMPLE
from PIL import Image
from test_explain import expected_trace, rounded
from test_snapshots import restored
from texts import make_pairs, make_text

import bench
import explain
import prepare_data
import train
from benchmarks import keystrokes
from humptygpt import loading as interchange
from humptygpt import run_folder, tasks
from humptygpt.checkpoint import load_plain
from humptygpt.config import UserError
from humptygpt.sampling import generate

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("needs Chromium, in which the page is opened", allow_module_level=True)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright, which drives the browser"
)

START = "Ak"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of two trained runs, out/run and out/pairs, and their pages."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(run_folder, "draw_losses", lambda *args: None)
        patch.setattr(tasks, "TEXT", WITHOUT_SAMPLE)
        Path("tiny.txt").write_text(make_text())
        Path("pairs.tsv").write_text(
            "".join(f"{source}\t{target}\n" for source, target in make_pairs())
        )
        prepare_data.main(["--input=tiny.txt", "--name=tiny"])
        prepare_data.main(["--input=pairs.tsv", "--name=pairs", "--tokenizer=byte"])
        train.main([*TINY_RUN, *PLAIN, "--block_size=32", "--position=rotary"])
        pairs = [
            "--dataset=pairs",
            "--out_dir=out/pairs",
            "--block_size=40",
            "--model=transformer",
        ]
        train.main(
            [
                *TINY_RUN,
                *PLAIN,
                *pairs,
                "--position=sinusoidal",
                "--norm=rmsnorm",
                "--mlp=gated",
            ]
        )
        window = [
            "--out_dir=out/window",
            "--model=window_mlp",
            "--window=4",
            "--block_size=32",
        ]
        train.main([*TINY_RUN, *PLAIN, *window])
        explain.main(["--out_dir=out/run", f"--start={START}"])
        explain.main(["--out_dir=out/pairs", "--start=Wo wohnst du?"])
        explain.main(["--out_dir=out/window", f"--start={START}"])
    return folder


STATE = """() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const problem = document.getElementById("problem");
  return {
    text: document.getElementById("text").value,
    ids: all("#tokens button").map((token) => +token.dataset.id),
    t: all("#tokens button").findIndex((token) => token.ariaPressed === "true"),
    bars: all("#bars button").map((bar) => [bar.dataset.id, bar.dataset.p]),
    complaint: problem.checkVisibility() ? problem.textContent : "",
  };
}"""


class Opened:
    """A page in a browser without a network, all that it asked for, and its console."""

    def __init__(self, browser, path: Path, hash: str = "", **options):
        self.context = browser.new_context(
            offline=True, **{"viewport": {"width": 1440, "height": 900}} | options
        )
        self.page, self.console, self.requests = self.context.new_page(), [], []
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"file://{path}{hash}")
        self.page.wait_for_selector("#page[aria-busy=false] #bars button")

    def settle(self) -> None:
        """Wait until what is shown is that of the text."""
        self.until("document.getElementById('page').ariaBusy === 'false'")

    def until(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        poll = (
            "done => (f => f(f))((f) => condition() ? done() : setTimeout(() => f(f), 10))"
        )
        self.page.evaluate(
            f"() => {{ const condition = () => {condition}; return new Promise({poll}); }}"
        )

    def state(self) -> dict:
        """When it is settled: the text, its tokens' ids, which is selected, the bars by token id, and the complaint."""
        self.settle()
        state = self.page.evaluate(STATE)
        return state | {"bars": {int(id): float(p) for id, p in state["bars"]}}

    def shown(self) -> dict[int, float]:
        """The probabilities of the bars, by token ids."""
        return self.state()["bars"]

    def select(self, **wanted) -> None:
        """By the hash, as a link to a view does."""
        query = "&".join(
            f"{key}={value}" for key, value in ({"section": "leaf"} | wanted).items()
        )
        change = """hash => new Promise((done) => {
          addEventListener("hashchange", () => done(), { once: true });
          location.hash = hash;
        })"""
        self.page.evaluate(change, f"#{query}")


@pytest.fixture
def opened(browser, runs, request):
    """Opens the page of a run; afterwards its console must be empty, and it must have asked for nothing but itself."""
    made = []

    def open_page(run: str = "run", hash: str = "", **options) -> Opened:
        made.append(Opened(browser, runs / "out" / run / "explain.html", hash, **options))
        return made[-1]

    yield open_page
    for each in made:
        each.context.close()
        others = [url for url in each.requests if not url.startswith("blob:")]
        assert each.console == [] and len(set(others)) == 1


def load(runs: Path, run: str = "run"):
    loaded = interchange.load(runs / "out" / run / "best.pt")
    return rounded(loaded.model, std=None), loaded.tokenizer


def tensor_of(tokenizer, text: str) -> torch.Tensor:
    return torch.tensor([tokenizer.encode(text).tolist()])


def test_the_bars_are_the_models_probabilities_and_change_with_each_keystroke(opened, runs):
    model, tokenizer = load(runs)
    view = opened()
    view.page.focus("#text")
    view.page.keyboard.press("Control+End")
    text = "Ak"
    for letter in ("i", "s", ""):
        with torch.no_grad():
            logits = model(tensor_of(tokenizer, text))[0][0, -1, : tokenizer.vocab_size]
        largest = logits.softmax(dim=-1).topk(8)
        expected = dict(zip(largest.indices.tolist(), largest.values.tolist(), strict=True))
        assert view.shown() == pytest.approx(expected, abs=1e-6)
        view.page.keyboard.type(letter)
        text += letter


def test_greedy_writes_what_sample_py_writes(opened, runs):
    model, tokenizer = load(runs)
    view = opened()
    idx = tensor_of(tokenizer, START)
    written = [
        token.item()
        for token in generate(model, idx, 12, tokenizer.vocab_size, temperature=0)
    ]
    view.page.check("#greedy")
    for _ in range(12):
        view.page.click("#write-one")
        view.settle()
    assert view.page.input_value("#text") == START + tokenizer.decode(written)


def test_text_that_has_no_tokens_is_reported_and_its_numbers_are_gone(opened):
    view = opened()
    view.page.fill("#text", "Aké")
    view.settle()
    assert view.page.inner_text("#problem").startswith(
        "character 'é' (U+00E9) is not among the "
    )
    assert not view.shown()
    view.page.fill("#text", "Ak")
    assert view.shown() and view.page.is_hidden("#problem")


def ids_in_context(tokenizer, text: str, block_size: int = 32) -> list[int]:
    """Of the tokens of a text, those that sample.py still sees when it has written up to there."""
    ids = tokenizer.encode(text or "\n").tolist()
    while len(ids) > block_size:
        ids = ids[block_size + 1 - block_size // 2 :]
    return ids


def assert_shows(view, model, tokenizer) -> None:
    """The bars are PyTorch's for the text in the field and the selected token, or there are none, and a complaint."""
    state = view.state()
    shown, t = state["bars"], state["t"]
    if set(state["text"]) - set(tokenizer.alphabet):
        assert state["complaint"] and not shown and not state["ids"]
        return
    ids = ids_in_context(tokenizer, state["text"])
    assert state["ids"] == ids and t >= 0 and not state["complaint"]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0][0, t, : tokenizer.vocab_size]
    probs = logits.softmax(dim=-1)
    assert shown == pytest.approx({id: probs[id].item() for id in shown}, abs=1e-6)
    assert min(shown.values()) >= probs.topk(8).values[-1].item() - 1e-6


def test_continue_writes_what_sample_py_writes_when_the_context_is_full_too(opened, runs):
    model, tokenizer = load(runs)
    view = opened()
    idx = tensor_of(tokenizer, START)
    written = generate(model, idx, 40, tokenizer.vocab_size, temperature=0)
    expected = START + tokenizer.decode([token.item() for token in written])
    view.page.check("#greedy")
    view.page.click("#go-on")
    view.until("document.getElementById('text').value.length > 42")
    view.page.click("#go-on")
    view.settle()
    text = view.page.input_value("#text")
    assert text.startswith(expected)
    view.page.wait_for_timeout(100)
    assert view.page.input_value("#text") == text


COMPUTER = """async () => {
  const { textContent: text, dataset } = document.getElementById("data");
  const answers = [];
  const own = forward;
  window.rows = [];
  forward = (...given) => {
    const trace = own(...given);
    rows.push(trace.idx.length - trace.first);
    return trace;
  };
  const computer = new Computer((answer) => answers.push(answer));
  let id = 0;
  const ask = (topic, message) => computer.answer({ topic, id: id++, ...message });
  await ask("open", { text, checksum: dataset.checksum });
  const full = "Akis osal ".repeat(3) + "Ak";
  await ask("read", { text: full });
  rows.length = 0;
  await ask("read", { text: full + "i" });
  const beyond = rows.splice(0);
  answers.length = 0;
  await Promise.all(Array.from({ length: 20 }, (_, i) => ask("read", { text: full.slice(i) + full.slice(0, i) })));
  const dropped = rows.splice(0).reduce((sum, n) => sum + n);
  return [beyond, dropped, answers.filter(({ news }) => news).length];
}"""


def test_a_key_computes_one_row_beside_the_page_and_outdated_keys_are_dropped(opened):
    view = opened()
    beyond, computed, answered = view.page.evaluate(COMPUTER)
    assert beyond == [1]  # the newest half of a full context is ready
    assert (
        answered == 1 and computed <= 20 * 16 + 16
    )  # of 20 texts, half, and of the last one all
    view.page.focus("#text")
    view.page.keyboard.type("kis osal")
    view.settle()
    assert view.page.evaluate("rows") == []  # on the thread that paints


ADDRESSES = {
    "#section=nonsense&t=x&key=-7&number=abc": START,
    "#text=Akis": "Akis",
    "#section=mlp&number=stack.nothing:1,2&number=stack.norm.output:999,1&text=Akis": "Akis",
    "#section=gpt&t=9999&layer=77&head=99&next=88&temperature=-3&text=Akis": "Akis",
    "#%E0%A4%A&text=Ak": "Ak",
}


def test_whatever_an_address_says_the_page_opens_and_survives_a_reload(opened, runs):
    model, tokenizer = load(runs)
    for hash, text in ADDRESSES.items():
        view = opened(hash=hash)
        assert view.page.input_value("#text") == text
        assert_shows(view, model, tokenizer)
        view.page.reload()
        assert_shows(view, model, tokenizer)
    view.page.fill("#text", "Aké")
    view.settle()
    view.until("decodeURI(location.hash).endsWith('é')")
    assert view.page.inner_text("#problem").startswith("character 'é'")
    view.page.reload()
    view.page.wait_for_selector("#page[aria-busy=false]")
    assert view.page.input_value("#text") == "Aké"


def test_after_an_unknown_character_all_sections_open_and_no_number_of_the_text_before_stays(
    opened, runs
):
    view = opened(hash="#section=leaf&number=logits:0,1&text=Akis")
    view.page.fill("#text", "Aké")
    view.settle()
    for chip in view.page.locator("#sections button").all():
        chip.click()
        assert not view.page.locator("#tokens button, #bars button, #drawer.open").count()
        of_text = "section.of-text .panel-body > :not(.intro)"
        assert not view.page.locator(of_text).filter(visible=True).count()
    greyed = """() => {
      const canvas = document.querySelector("#flow .stream");
      const { filter, opacity } = getComputedStyle(canvas);
      return canvas.checkVisibility() && filter === "grayscale(1)" && opacity < 0.5;
    }"""
    view.page.get_by_role("button", name="The model").click()
    assert view.page.evaluate(greyed) and view.page.is_hidden("#flow .embed .adds")
    assert view.page.inner_text("#picture-title").startswith("Greyed: the last text that")
    view.page.fill("#text", "Akisa")
    assert_shows(view, *load(runs))
    assert not view.page.evaluate(greyed) and view.page.is_visible("#flow .embed .adds")


@pytest.mark.parametrize("width", [390, 1440])
def test_a_complaint_stands_below_the_field_and_covers_nothing(opened, width):
    view = opened(viewport={"width": width, "height": 800})
    view.page.fill("#text", "Aké")
    view.settle()
    below = """() => {
      const problem = document.getElementById("problem").getBoundingClientRect();
      const covers = [...document.querySelectorAll("button, textarea")].filter((item) => {
        const { left, right, top, bottom } = item.getBoundingClientRect();
        return left < problem.right && right > problem.left && top < problem.bottom && bottom > problem.top;
      });
      return [problem.top - document.getElementById("text").getBoundingClientRect().bottom, covers.length];
    }"""
    distance, covered = view.page.evaluate(below)
    assert 0 <= distance < 20 and covered == 0


def back(view) -> None:
    view.page.evaluate(
        "new Promise((done) => { addEventListener('hashchange', done, { once: true }); history.back(); })"
    )
    view.settle()


def test_back_leads_through_numbers_and_sections_and_escape_closes_the_drawer(opened):
    view = opened()
    head = view.page.locator("#arithmetic h3")
    view.page.get_by_role("button", name="Softmax").click()
    view.page.locator("#softmax input[type=range]").nth(0).fill("0.5")
    view.page.locator("#bars .number").nth(0).click()
    first = head.inner_text()
    view.page.locator("#arithmetic .operand").nth(0).click()
    second = head.inner_text()
    view.page.get_by_role("button", name="Back").click()
    assert head.inner_text() == first != second
    assert view.page.get_by_role("button", name="Back").is_disabled()
    back(view)
    assert head.inner_text() == second
    back(view)
    assert head.inner_text() == first
    view.page.keyboard.press("Escape")
    assert not view.page.locator("#drawer.open").count()
    back(view)
    back(view)
    back(view)
    assert view.page.inner_text("#sections [aria-current=true]") == "The model"
    view.page.evaluate("history.go(1)")
    view.until("location.hash.includes('temperature=0.5')")
    view.page.reload()
    view.settle()
    assert view.page.locator("#softmax input[type=range]").nth(0).input_value() == "0.5"


def test_a_number_stays_with_its_section_when_another_is_chosen(opened):
    view = opened("run", "#section=softmax&text=Akis")
    view.page.locator("#softmax .operand").nth(0).click()
    number = view.page.inner_text("#arithmetic h3")
    view.page.get_by_role("button", name="Softmax").click()
    assert view.page.locator("#drawer.open").count()
    view.page.get_by_role("button", name="Residual").click()
    assert not view.page.locator("#drawer.open").count()
    back(view)
    assert view.page.inner_text("#arithmetic h3") == number


def darkest(view: Opened, selector: str, side: int) -> int:
    """The darkest shade of grey at the left (0) or right (-1) edge of an element's lower end, where no text is."""
    picture = Image.open(io.BytesIO(view.page.locator(selector).screenshot())).convert("L")
    x = side % picture.width
    return min(picture.getpixel((x, y)) for y in range(picture.height - 4, picture.height))


def test_on_a_phone_what_goes_on_sideways_shows_that_it_does(opened):
    view = opened(
        "run", "#section=softmax&text=Akis", viewport={"width": 390, "height": 844}
    )
    scroll = "#softmax .scroll"
    assert darkest(view, scroll, -1) < 235 < darkest(view, scroll, 0)
    view.page.eval_on_selector(scroll, "box => box.scrollLeft = 1e4")
    assert darkest(view, scroll, 0) < 235 < darkest(view, scroll, -1)
    hidden = """part => {
      const [own, flow] = [part, part.closest("#flow")].map((box) => box.getBoundingClientRect());
      return [own.right > flow.right - 20, getComputedStyle(part.closest("#flow")).maskImage !== "none"];
    }"""
    view.page.get_by_role("button", name="The model").click()
    assert view.page.eval_on_selector("#flow .head", hidden) == [True, True]
    view.page.locator("#bars .number").nth(0).click()  # which is computed there
    assert view.page.eval_on_selector("#flow .head", hidden) == [False, True]


def test_the_dials_open_at_a_distance_at_which_they_have_turned(opened):
    view = opened("run", "#section=positions&text=Akis osal")
    assert view.page.locator("#positions input").input_value() == "5"
    told = view.page.get_attribute("#positions .dials", "aria-label")
    assert told.startswith(
        "Query 8, key 3: 5 positions apart. The first pair is rotated by 5.0000"
    )
    slide(view, "positions", 1)
    assert "1 position apart" in view.page.inner_text("#positions")


def test_typing_moves_nothing_that_is_read_and_ends_the_writing_of_the_model(opened):
    view = opened(hash="#section=positions&text=A")
    top = "document.getElementById('title-positions').getBoundingClientRect().top"
    before = view.page.evaluate(top)
    view.page.focus("#text")
    for letter in "kis osal":
        view.page.keyboard.type(letter)
        view.settle()
        view.page.wait_for_timeout(20)
        assert abs(view.page.evaluate(top) - before) < 2
    view.page.click("#go-on")
    view.page.fill("#text", "Aké")
    view.settle()
    assert view.page.inner_text("#go-on") == "Continue"
    assert view.page.input_value("#text") == "Aké"


def test_a_translation_is_written_on_opening_and_says_what_it_does_not_read(opened, runs):
    view = opened("pairs")
    view.settle()
    assert len(view.page.input_value("#text")) > 1
    view.until("document.getElementById('ended').textContent !== ''")
    assert view.page.inner_text("#ended").startswith("The context is full")
    assert view.page.locator("#transformer .arcs line").count() > 1
    view.page.fill("#source", "Haus " * 20)
    view.page.wait_for_selector("#problem:not(:empty)")
    assert view.page.inner_text("#problem").startswith(
        "The context has no room for the last 60 tokens of the sentence: they are not read."
    )


def test_the_strongest_key_is_selected_and_its_cell_can_be_read(opened, runs):
    model, tokenizer = load(runs)
    view = opened(hash="#section=attention&layer=1&head=1&text=" + "Akis osal Akis")
    ids = ids_in_context(tokenizer, "Akis osal Akis")
    weights = expected_trace(model, ids, None, tokenizer.vocab_size)
    row = weights["stack.blocks.1.attn.weights"][1, -1]
    strip, matrix = (
        view.page.locator("#attention canvas[tabindex]").nth(i) for i in (0, 1)
    )
    value = f"{row.max().item():.4f}"
    for canvas in (strip, matrix):
        assert canvas.get_attribute("aria-valuetext").endswith(value)
    assert matrix.bounding_box()["height"] / 14 >= 13


def test_a_number_and_its_operands_light_up_in_the_picture_where_they_live(opened):
    view = opened(hash="#section=model&text=Akis")
    lit = """kind => [...document.querySelectorAll(`#flow .${kind}`)].map(
      (part) => `${part.closest("li").querySelector(".stage-name").textContent} ${part.className.split(" ")[0]}`)"""
    places = {
        "stack.blocks.1.after_mlp:3,1": (["Layer 2 stream"], ["Layer 2 part"]),
        "stack.blocks.0.attn.weights:0,3,1": (["Layer 1 part"], []),
        "logits:3,1": (["Output part"], []),
    }
    for address, (origin, operands) in places.items():
        view.select(section="model", number=address, text="Akis")
        assert view.page.evaluate(lit, "origin") == origin
        assert view.page.evaluate(lit, "lit") == operands
    view.select(section="residual", number="stack.blocks.1.after_mlp:3,1", text="Akis")
    assert "residual stream after the MLP, layer 2" in view.page.inner_text(
        "#arithmetic h3"
    )
    assert view.page.locator("#residual select").input_value() == "1"
    view.until("document.querySelector('#residual .strip.origin, #residual .strip.lit')")
    labels = view.page.locator("#residual .strip:is(.origin, .lit) .strip-label")
    assert labels.all_inner_texts() == ["after attention", "MLP adds", "after MLP"]


INTO_VIEW = """async ([selector, random]) => {
  const visible = [...document.querySelectorAll(selector)].filter((item) => item.checkVisibility());
  const item = visible[Math.floor(random * visible.length)];
  if (!item) return null;
  for (const block of ["nearest", "center", "end", "start"]) {
    const before = scrollY;
    item.scrollIntoView({ block, inline: "nearest", behavior: "instant" });
    if (scrollY !== before) await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    const { left, top, width, height } = item.getBoundingClientRect();
    const at = [left + width / 2, top + height / 2];
    if (item.contains(document.elementFromPoint(...at))) return at;
  }
  return "covered";
}"""


class Walk:
    """Random actions on a page, as of someone who tries everything."""

    def __init__(self, view: Opened, seed: int):
        self.view, self.page, self.draw = view, view.page, random.Random(seed)

    def type(self) -> None:
        self.page.focus("#text")
        self.page.keyboard.press("Control+End")
        self.page.keyboard.insert_text(self.draw.choice("aks \né"))

    def erase(self) -> None:
        self.page.focus("#text")
        self.page.keyboard.press(self.draw.choice(["Backspace", "Home", "Delete"]))

    def paste(self) -> None:
        self.page.fill(
            "#text", "".join(self.draw.choices("Akis osal\n", k=self.draw.randrange(60)))
        )

    def click(self, selector: str) -> None:
        """With the mouse, on one of those that can be seen, brought into view; nothing may cover it then."""
        at = self.page.evaluate(INTO_VIEW, [selector, self.draw.random()])
        assert at != "covered", selector
        if at:
            self.page.mouse.click(*at)

    def write(self) -> None:
        self.page.click("#go-on")
        self.page.wait_for_timeout(self.draw.randrange(60))
        if self.page.inner_text("#go-on") == "Stop":
            self.page.click("#go-on")

    def escape(self) -> None:
        self.page.keyboard.press("Escape")

    def back(self) -> None:
        if self.page.evaluate("history.length") > 2:
            self.page.evaluate("history.back()")
            self.page.wait_for_timeout(60)
            if not self.page.url.startswith("file:"):
                self.page.go_forward()

    def reload(self) -> None:
        self.page.wait_for_timeout(200)  # the address is written with a limit on how often
        text = self.page.input_value("#text")
        self.page.reload()
        self.view.settle()
        assert self.page.input_value("#text") == text

    def resize(self) -> None:
        size = {
            "width": self.draw.choice([390, 800, 1440]),
            "height": self.draw.choice([600, 900]),
        }
        self.page.set_viewport_size(size)

    CLICKED = (
        "#tokens button",
        "#sections button",
        "#flow button",
        "#bars .choose",
        "#bars .number",
        "#arithmetic button:not([disabled])",
    )
    ACTIONS = (
        [type, erase, *(lambda self, on=selector: self.click(on) for selector in CLICKED)]
        * 3
        + [paste, write, escape, back] * 2
        + [reload, resize]
    )

    def step(self) -> None:
        self.draw.choice(self.ACTIONS)(self)


@pytest.mark.parametrize(
    "actions", [30, pytest.param(2_000, marks=pytest.mark.long)], ids=str
)
def test_after_any_actions_the_numbers_are_those_of_the_text(opened, runs, actions):
    model, tokenizer = load(runs)
    view = opened(reduced_motion="reduce")  # no frames but for what changes
    walk = Walk(view, seed=actions)
    for _ in range(actions):
        walk.step()
        assert_shows(view, model, tokenizer)
        assert view.console == []
    view.page.fill("#text", "Akis osal")
    view.settle()
    trace = expected_trace(
        model, tokenizer.encode("Akis osal").tolist(), None, tokenizer.vocab_size
    )
    chosen = dict(addresses(trace, 40))
    for address, y in drawers(view, chosen, "Akis osal").items():
        assert abs(y["value"] - chosen[address]) < 1e-4, address


DRAWERS = """async ([addresses, query]) => {
  const found = {};
  for (const address of addresses) {
    await new Promise((done) => {
      addEventListener("hashchange", done, { once: true });
      location.hash = `#${query}&number=${address}`;
    });
    const rows = [...document.querySelectorAll("#arithmetic .terms")][0].rows;
    const terms = [...rows].filter((row) => row.dataset.term !== undefined).map((row) => +row.dataset.term);
    const value = document.querySelector("#arithmetic .value");
    const results = [...rows].filter((row) => row.className === "sum").map((row) => row.lastChild.textContent);
    found[address] = { value: +value.dataset.value, shown: value.textContent, terms, results };
  }
  return found;
}"""


def drawers(view: Opened, addresses: Iterable[str], text: str) -> dict[str, dict]:
    """By its address each number as the drawer shows it, its terms, and the results below them."""
    query = f"section=leaf&text={text}"
    return view.page.evaluate(DRAWERS, [list(addresses), query])


def number(text: str) -> float:
    return float(text.replace("−", "-").replace("∞", "inf"))


def addresses(trace: dict, n: int) -> list[tuple[str, float]]:
    """Of n numbers of a trace, chosen at random."""
    names = [name for name in trace if not re.search("first|idx|mask", name)]
    draw = random.Random(1)
    chosen = []
    for _ in range(n):
        name = draw.choice(names)
        at = [draw.randrange(size) for size in trace[name].shape]
        if re.search("attn.(scores|weights)", name) and not re.search("source|cross", name):
            at[2] = min(at[1:])  # a later key is not computed
        if name in ("logits", "probs"):
            at[0] = trace[name].shape[0] - 1
        chosen.append((f"{name}:{','.join(map(str, at))}", trace[name][tuple(at)].item()))
    return chosen


@pytest.mark.parametrize(
    ("run", "n"),
    [
        ("run", 50),
        ("pairs", 30),
        pytest.param("run", 400, marks=pytest.mark.long),
        pytest.param("pairs", 400, marks=pytest.mark.long),
    ],
)
def test_the_drawer_shows_pytorchs_numbers_and_its_terms_add_up_to_them(
    opened, runs, run, n
):
    model, tokenizer = load(runs, run)
    text, source = {"run": ("Akis osal", None), "pairs": ("Where", "Wo wohnst du?")}[run]
    idx = tokenizer.encode(text).tolist()
    if source:
        idx.insert(0, tokenizer.eot)
        source = [*tokenizer.encode(source).tolist(), tokenizer.eot]
    view = opened(run, f"#section=leaf&text={text}")
    chosen = dict(addresses(expected_trace(model, idx, source, tokenizer.vocab_size), n))
    for address, y in drawers(view, chosen, text).items():
        value = chosen[address]
        unit = (
            10.0 ** -len(y["shown"].partition(".")[2])
            if "e" not in y["shown"]
            else abs(value) / 10
        )
        assert abs(number(y["shown"]) - value) <= unit, address
        result = number(y["results"][-1]) if y["results"] else sum(y["terms"])
        assert abs(result - y["value"]) <= max(unit, 1e-5), address
        if len(y["results"]) > 1 or not y["results"]:
            continue
        if len(y["terms"]) > 1:  # no step after the sum
            assert sum(y["terms"]) == pytest.approx(y["value"], abs=1e-5), address


def test_the_hash_restores_the_view(opened):
    view = opened()
    view.page.fill("#text", "Akis osal")
    view.page.locator("#tokens button").nth(3).click()
    view.page.get_by_role("button", name="Self-attention").click()
    view.page.locator("#attention select").nth(0).select_option(label="2")
    view.page.locator("#attention canvas[tabindex]").nth(0).click(
        position={"x": 30, "y": 5}
    )
    kept = "location.hash.includes('number=') ? done() : setTimeout(poll, 20)"
    view.page.evaluate(
        f"() => new Promise((done) => {{ const poll = () => {kept}; poll(); }})"
    )
    state = """() => {
      const at = (query) => document.querySelector(query).textContent;
      const bars = document.querySelector("#sections").getBoundingClientRect().bottom;
      const top = document.querySelector("#attention").getBoundingClientRect().top - bars;
      return [document.getElementById("text").value, at("#tokens [aria-pressed=true]"), at("#arithmetic h3"),
        at("#arithmetic .value"), document.querySelector("#attention select").value,
        at("#sections [aria-current=true]"), Math.abs(top) < 300];
    }"""
    before, hash = view.page.evaluate(state), view.page.evaluate("location.hash")
    assert before[0] == "Akis osal" and before[4] == "1" and before[-1]
    assert opened(hash=hash).page.evaluate(state) == before


def test_the_leaf_network_is_trained_to_95_percent_stops_and_explodes_with_a_reason(opened):
    view = opened(hash="#section=training")
    panel = view.page.locator("#training")
    panel.get_by_role("button", name="Run").click()
    expect = playwright.expect(panel.locator("[data-accuracy]"))
    expect.to_have_attribute(
        "data-accuracy", re.compile(r"^(1|0\.9[5-9].*)$"), timeout=30_000
    )
    panel.get_by_role("button", name="Stop").click()
    assert panel.get_by_role("button", name="Run").is_visible()
    panel.get_by_role("button", name="Start over").click()
    panel.locator("input[type=range]").fill("3")
    for _ in range(20):
        panel.get_by_role("button", name="Step").click()
    assert "Exploded" in panel.locator(".status").inner_text()


def test_the_keyboard_alone_walks_over_tokens_and_numbers_and_opens_their_arithmetic(
    opened,
):
    view = opened(hash="#section=embeddings")
    press = view.page.keyboard.press
    view.page.focus("#text")
    press("Tab")
    assert view.page.evaluate("document.activeElement.parentElement.id") == "tokens"
    press("ArrowLeft")
    assert view.page.locator("#tokens [aria-pressed=true]").inner_text() == "A"
    focused = "document.activeElement.getAttribute('aria-label')"
    for _ in range(80):
        press("Tab")
        if view.page.evaluate(focused) == "token embedding":
            break
    assert view.page.evaluate(focused) == "token embedding"
    press("ArrowRight")
    press("ArrowRight")
    assert "token embedding, position 0, feature 2" in view.page.inner_text(
        "#arithmetic h3"
    )
    assert view.page.evaluate(focused) == "token embedding"


CONTROLS = "button:not([disabled], #tokens *), select, input, textarea, summary, canvas[tabindex], .scroll"
KEYS = {
    **{
        "button": ("Enter",),
        "summary": ("Enter",),
        "checkbox": (" ",),
        "textarea": ("k",),
        "div": ("ArrowRight",),
    },
    **{
        "range": ("ArrowRight", "ArrowLeft"),
        "select": ("ArrowDown", "ArrowUp"),
        "canvas": ("ArrowRight", "ArrowUp", "ArrowLeft"),
    },
}
WATCH = """controls => {
  addEventListener("focusin", ({ target }) => (target.seen = true));
  window.visible = () => [...document.querySelectorAll(controls)].filter((control) => control.checkVisibility());
  window.state = () => [control.value, control.checked, control.ariaValueText, document.getElementById("text").value];
  return visible().length;
}"""
FOCUS = """i => {
  window.control = visible()[i];
  if (!control) return [null, "", ""];
  control.focus();
  const kind = { checkbox: "checkbox", range: "range" }[control.type] ?? control.localName;
  return [kind, control.outerHTML.slice(0, 300), state().join()];
}"""
AFTER = (
    "() => [state().join(), document.activeElement !== document.body, control.textContent]"
)


@pytest.mark.parametrize("run", ["run", pytest.param("pairs", marks=pytest.mark.long)])
def test_tab_leads_to_every_control_and_each_obeys_its_keys_and_keeps_the_focus(
    opened, run
):
    view = opened(
        run, "#section=gpt&number=logits:0,1", viewport={"width": 1440, "height": 300}
    )
    press, ask = view.page.keyboard.press, view.page.evaluate
    # the selected token, what sections have more when they come into view, and once around
    for _ in range(ask(WATCH, CONTROLS) + 40):
        press("Tab")
    assert (
        ask(
            "visible().filter((control) => !control.seen).map((control) => control.outerHTML)"
        )
        == []
    )
    for number in range(1000):
        kind, label, before = ask(FOCUS, number)
        if not kind:
            break
        for key in KEYS[kind]:
            press(key)
            after, focused, text = ask(AFTER)
            assert focused, label
            if after != before:
                break
        assert after != before or kind in ("button", "summary", "div"), label
        if text == "Stop":
            press("Enter")
    assert number > 60


def test_nothing_moves_where_reduced_motion_is_asked_for(opened):
    moving = """() => [...document.querySelectorAll("*")].filter((e) => {
      const { transitionDuration, animationName, scrollBehavior } = getComputedStyle(e);
      return !/^0s(, 0s)*$/.test(transitionDuration) || animationName !== "none" || scrollBehavior !== "auto";
    }).length"""
    assert (
        opened(hash="#section=gpt", reduced_motion="no-preference").page.evaluate(moving)
        > 0
    )
    view = opened(hash="#section=gpt", reduced_motion="reduce")
    assert view.page.evaluate(moving) == 0
    view.page.locator("#bars button").nth(1).click()
    assert view.page.evaluate("document.getAnimations().length") == 0


@pytest.mark.parametrize(
    ("run", "scheme"),
    [
        ("run", "light"),
        pytest.param("run", "dark", marks=pytest.mark.long),
        pytest.param("pairs", "light", marks=pytest.mark.long),
        ("window", "dark"),
    ],
)
def test_axe_finds_nothing(opened, run, scheme):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs axe-playwright-python"
    )
    view = opened(run, "#section=gpt", color_scheme=scheme)
    assert_axe_finds_nothing(axe, view)
    view.page.locator("#bars .number").nth(0).click()
    assert_axe_finds_nothing(axe, view)
    if run == "run":
        view.page.set_viewport_size({"width": 390, "height": 844})
        assert_axe_finds_nothing(axe, view)
        view.page.fill("#text", "Aké")
        view.settle()
        assert_axe_finds_nothing(axe, view)


def assert_axe_finds_nothing(axe, view: Opened) -> None:
    found = axe.Axe().run(view.page).response["violations"]
    assert {
        rule["id"]: [node["html"][:120] for node in rule["nodes"][:3]] for rule in found
    } == {}


@pytest.mark.parametrize(("width", "zoom"), [(360, 1), (768, 1), (1440, 2)])
@pytest.mark.parametrize("run", ["run", "pairs", "window"])
def test_nothing_scrolls_sideways(opened, run, width, zoom):
    view = opened(
        run,
        "#section=gpt",
        viewport={"width": width // zoom, "height": 900 // zoom},
        device_scale_factor=zoom,
    )
    view.page.locator("#bars button").nth(1).click()
    sizes = view.page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert sizes[0] <= sizes[1]


@pytest.mark.long
def test_the_time_until_a_keystroke_is_painted_is_measured_in_each_case(
    browser, runs, fails, monkeypatch
):
    monkeypatch.setattr(keystrokes, "FIRST_KEYS", 0)
    page, pairs = (runs / "out" / run / "explain.html" for run in ("run", "pairs"))
    figures = keystrokes.time_page(browser, page, 2)
    keys = {
        f"{where}_{size}"
        for where in ("appended", "anywhere")
        for size in ("64", "full", "beyond")
    }
    assert figures.keys() == keys | {"burst", "continued", "longest_task"}
    assert all(0 < figures[key]["median_ms"] <= figures[key]["p95_ms"] for key in keys)
    assert figures["burst"]["ms"] > 0 and figures["continued"]["tokens_per_s"] > 0
    with pytest.raises(UserError, match="its tokens are not characters"):
        keystrokes.time_page(browser, pairs, 2)
    assert "make it with explain.py" in fails(bench.main, "--what=page", "--page=none.html")


def test_a_section_for_which_the_run_has_nothing_names_a_command_that_trains_one(opened):
    view = opened("window", "#section=transformer")
    commands = view.page.eval_on_selector_all(
        ".missing code", "all => all.map((item) => item.textContent)"
    )
    assert len(commands) >= 7
    for command in commands:
        config = re.fullmatch(r"python train.py (config/[\w/.-]+)", command)[1]
        assert (Path(explain.__file__).parent / config).exists()


def test_what_a_model_has_not_stands_at_the_end_without_numbers(opened):
    absent = {
        "run": {"subwords", "transformer"},
        "window": {"attention", "mlp", "transformer"},
    }
    for run, missing in absent.items():
        view = opened(run)
        numbers = view.page.locator("section h2 .count").all_inner_texts()
        assert numbers == [f"{i}" for i in range(1, len(numbers) + 1)]
        *chips, last = view.page.locator("#sections button").all_inner_texts()
        assert len(chips) == len(numbers) + 1 and last == "Not for this model"
        articles = "all => all.map((article) => article.id)"
        found = view.page.eval_on_selector_all("section:last-child article", articles)
        assert missing <= set(found)
        view.page.click("text=Not for this model >> nth=0")
        view.until("document.activeElement.id.startsWith('title-')")
        assert view.page.inner_text("#sections [aria-current=true]") == "Not for this model"


def test_a_page_whose_data_was_damaged_says_so_instead_of_showing_numbers(
    browser, runs, tmp_path
):
    whole = (runs / "out" / "run" / "explain.html").read_text()
    at = whole.index('"bytes":"') + 1000
    (tmp_path / "page.html").write_text(
        whole[:at] + ("A" if whole[at] != "A" else "B") + whole[at + 1 :]
    )
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/page.html")
    playwright.expect(page.locator("#problem")).to_contain_text(
        "The data of this page is damaged"
    )
    assert page.is_hidden("#page")
    page.close()


# --------------------------------------------------------------------------------------
# What is written


def test_each_byte_that_is_no_character_has_a_sign_of_its_own(opened):
    view = opened("pairs", "#text=ä&source=Haus")
    assert view.page.locator("#tokens button").all_inner_texts()[1:] == ["xC3", "xA4"]
    signs = view.page.evaluate("""() => {
      const { tokenizer } = JSON.parse(document.getElementById("data").textContent);
      const { pieces, ...rest } = makeTokenizer(tokenizer);
      return pieces.map((_, id) => shown({ pieces, ...rest }, id));
    }""")
    assert len(set(signs)) == 257
    assert all(sign.isprintable() and sign.strip("\ufffd ") for sign in signs)


def everything(view: Opened) -> str:
    """All texts of a page, those for a screen reader and of hovering, too; no tokens and commands."""
    read = """() => [...document.querySelectorAll("#page :not(code)")].flatMap((node) => {
      const texts = [...node.childNodes].filter(({ nodeType }) => nodeType === Node.TEXT_NODE);
      return [...texts.map(({ data }) => data), node.title, node.ariaLabel, node.ariaValueText];
    }).filter(Boolean).join("\\n")"""
    return view.page.evaluate(read)


SMALLEST = """() => {
  const { model, ...data } = JSON.parse(document.getElementById("data").textContent);
  const one = { ...model, n_layer: 1, n_head: 1, mlp_conv: 1 };
  return [describeRun({ ...data, parameters: 1, model: one }), digits(-0.5), digits(-2e-7), signed(-2e-7)].join("\\n");
}"""


@pytest.mark.parametrize("run", ["run", "pairs", "window"])
def test_numbers_have_one_minus_sign_and_one_of_a_thing_is_no_plural(opened, run):
    view = opened(run, "#text=A&source=H" if run == "pairs" else "#text=A")
    written = view.page.evaluate(SMALLEST) + everything(view)
    assert written.count("−") > 10
    assert not re.findall(r"(?<!\w)-[\d.∞].*|.*e-\d.*", written)
    counted = "token|layer|head|step|position|key|term|neuron|feature|other"
    assert re.search(rf"\b1 ({counted})\b", written)
    assert not re.findall(rf".*(?<![\d.,])1 (?:{counted})s\b.*", written)


def test_only_an_embedding_to_which_positions_are_added_is_called_one_with_position(opened):
    for run, stack, text in (("run", "stack", "Akis"), ("pairs", "decoder", "Where")):
        view = opened(run, f"#number={stack}.blocks.0.input:1,1&text={text}&source=Haus")
        there = run == "pairs"
        title = view.page.inner_text("#arithmetic h3")
        assert title.startswith("embedding with position," if there else "embedding,")
        assert bool(view.page.locator("#flow .part.position").count()) == there
        assert ("with position" in everything(view)) == there


def test_where_decimals_are_shown_the_rounding_of_the_weights_is_told(opened):
    view = opened("run", "#text=Akis&number=logits:3,1")
    for part in ("#arithmetic", "#softmax"):
        assert "16 bits" in view.page.inner_text(part)


def test_with_forced_colours_the_bars_can_be_seen(opened):
    view = opened("run", "#text=Akis", forced_colors="active")
    ground = "getComputedStyle(document.body).backgroundColor"
    for bar in (".bar", ".balance span"):
        colours = view.page.eval_on_selector_all(
            bar, "all => all.map((bar) => getComputedStyle(bar).backgroundColor)"
        )
        assert colours and view.page.evaluate(ground) not in colours
    assert (
        view.page.evaluate(
            "getComputedStyle(document.querySelector('.strip canvas')).forcedColorAdjust"
        )
        == "none"
    )


def test_printed_the_sections_not_yet_visited_are_those_of_the_text(opened):
    view = opened("run", "#section=model&text=Akis")
    view.page.fill("#text", "Akis osa")
    view.settle()
    view.page.emulate_media(media="print")
    blank = view.page.evaluate("""() => {
      dispatchEvent(new Event("beforeprint"));
      const blank = (canvas) => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return canvas.checkVisibility() && !data.some((x) => x);
      };
      return [...document.querySelectorAll("section .strip canvas")].filter(blank).map((canvas) => canvas.ariaLabel);
    }""")
    assert blank == []
    for section in view.page.locator("section").all():
        assert section.is_visible() and len(section.inner_text()) > 80
    assert "Logit lens for the token after “a”" in view.page.inner_text("#gpt")
    assert view.page.is_hidden("#sections-part") and view.page.is_hidden("#writing-part")


# --------------------------------------------------------------------------------------
# How the model came to be, and one step more


def mean_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids[:, :-1], ids[:, 1:])[1]


def slide(view: Opened, section: str, value: float) -> None:
    move = "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }"
    view.page.eval_on_selector(f"#{section} input[type=range]", move, value)


def status(view: Opened, section: str, words: str) -> float:
    """The loss that a section's status gives, once it says this."""
    element = view.page.locator(f"#{section} [role=status]", has_text=words)
    return float(element.get_attribute("data-loss"))


def test_a_slider_goes_through_the_training_from_its_first_step_to_the_model_of_now(
    opened, runs
):
    model, tokenizer = load(runs)
    text = "Akis unat"
    ids = tensor_of(tokenizer, text)
    saved = load_plain(runs / "out/run/snapshots/0.pt")["rows"]
    view = opened("run", f"#section=learned&text={text}")
    for number, (words, then) in enumerate(
        [("After step 0 ", restored(saved, model)), ("After step 6 ", model)]
    ):
        slide(view, "learned", number)
        with torch.no_grad():
            logits = then(ids)[0][0]
            loss = mean_loss(then, ids).item()
        assert status(view, "learned", words) == pytest.approx(loss, abs=1e-5)
        strip = view.page.get_by_role("slider", name="Loss of each token")
        strip.focus()
        view.page.keyboard.press("Home")
        view.page.keyboard.press("ArrowRight")
        second = -logits[0].log_softmax(-1)[ids[0, 1]].item()
        shown = strip.get_attribute("aria-valuetext")
        assert shown == f"“k”: {second:.4f}"
        row = view.page.locator("#learned tbody tr").first.locator("td").all_inner_texts()
        p = logits[-1].softmax(-1).max().item()
        assert row[1] == (f"{100 * p:.2f} %" if p < 0.1 else f"{100 * p:.1f} %")


def test_a_step_of_gradient_descent_on_the_text_is_pytorchs_and_can_be_undone(opened, runs):
    model, tokenizer = load(runs)
    ids = tensor_of(tokenizer, "Akis unat")
    view = opened("run", "#section=step&text=Akis unat")
    view.page.click("text=Take a step")
    view.page.click("text=Take a step")
    losses = []
    for _ in range(3):
        loss = mean_loss(model, ids)
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    assert losses[2] < losses[1] < losses[0]
    assert status(view, "step", "2 steps") == pytest.approx(losses[2], abs=1e-4)
    parts = view.page.locator("#step table").last.locator("tbody tr td:first-child")
    assert parts.all_inner_texts()[:3] == ["embedding", "layer 1 attention", "layer 1 MLP"]
    view.page.click("text=Undo")
    assert status(view, "step", "1 step ") == pytest.approx(losses[1], abs=1e-4)
    view.page.click("text=Undo")
    view.page.wait_for_selector("text=The weights are those of the run.")
    view.page.click("text=Undo")  # there is nothing more to undo
    view.page.click("text=Take a step")
    assert status(view, "step", "1 step ") == pytest.approx(losses[1], abs=1e-4)
    view.page.fill("#text", "Akis")  # of another text it says nothing
    view.page.wait_for_selector("text=The weights are those of the run.")


@pytest.mark.parametrize("run", ["pairs", "window"])
def test_a_model_without_a_backward_pass_says_in_its_section_why(opened, run):
    view = opened(run, "#section=step")
    view.page.wait_for_selector("#step .missing >> text=This page trains models with")
    assert not view.page.locator("#step button").count()


def test_the_leaf_networks_boundary_moves_with_each_step(opened):
    view = opened("run", "#section=training")
    pixels = "canvas => canvas.toDataURL()"
    before = view.page.eval_on_selector_all("#training .field", f"all => all.map({pixels})")
    view.page.click("#training >> text=Step")
    after = view.page.eval_on_selector_all("#training .field", f"all => all.map({pixels})")
    assert len(before) == 2 and all(a != b for a, b in zip(before, after, strict=True))
