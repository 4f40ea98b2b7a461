"""The page of a run in a real browser, offline: what it shows is PyTorch's, and hands that have no mouse can use it.

Needs Chromium (Debian: apt-get install chromium) and the packages playwright and axe-playwright-python.
"""

import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, WITHOUT_SAMPLE
from test_explain import expected_trace, rounded
from test_snapshots import restored
from texts import make_pairs, make_text
from uncached import generate

import explain
import prepare_data
import train
from benchmarks import keystrokes
from humptygpt.formats import load as interchange
from humptygpt.formats.checkpoint import load_plain
from humptygpt.page.html import fill, to_text
from humptygpt.page.page_data import page_data
from humptygpt.training import evaluation
from humptygpt.training import run as run_module
from humptygpt.training.optimizers import make_optimizer, set_lr
from humptygpt.training.settings import TrainConfig

START = "Ak"
SMALL = "--block_size=40 --position=sinusoidal --norm=rmsnorm --mlp=gated"
RUNS = {
    "run": ["--block_size=32", "--position=rotary"],
    "pairs": ["--dataset=pairs", "--model=transformer", *SMALL.split()],
    "members": ["--block_size=32", "--position=rotary", "--n_members=2"],
    "window": ["--model=window_mlp", "--window=4", "--block_size=32"],
}
pytestmark = pytest.mark.page
PLAYGROUND = "--playground=out/playground/explain.html"
PATIENCE = 30  # seconds for what a page does by itself


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the trained runs, out/run and so on, and their pages."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(run_module, "draw_losses", lambda *args: None)
        patch.setattr(evaluation, "TEXT", WITHOUT_SAMPLE)
        Path("tiny.txt").write_text(make_text())
        Path("pairs.tsv").write_text("".join("\t".join(x) + "\n" for x in make_pairs()))
        prepare_data.main(["--input=tiny.txt", "--name=tiny"])
        prepare_data.main(["--input=pairs.tsv", "--name=pairs", "--tokenizer=byte"])
        starts = dict.fromkeys(RUNS, START) | {"pairs": "Wo wohnst du?"}
        for name, keys in RUNS.items():
            train.main([*TINY_RUN, f"--out_dir=out/{name}", *keys])
            explain.main([f"--out_dir=out/{name}", f"--start={starts[name]}"])
        Path("out/playground").mkdir()
        explain.main([PLAYGROUND])
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

SAID = "[...document.querySelectorAll('[role=status], #go-on')].map((it) => it.textContent)"
AT_REST = "document.getElementById('page').ariaBusy === 'false'"


class Opened:
    """A page in a browser without a network, all that it asked for, and its console."""

    def __init__(self, browser, path: Path, hash: str = "", **options):
        self.context = browser.new_context(offline=True, **{"viewport": {"width": 1440, "height": 900}} | options)
        self.page, self.console, self.requests = self.context.new_page(), [], []
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"file://{path}{hash}")
        self.page.wait_for_selector("#page[aria-busy=false] #bars button", state="attached")

    def settle(self) -> None:
        """Wait until the page shows the numbers of the text."""
        self.until(AT_REST)

    def until(self, condition: str, seconds: int = PATIENCE) -> None:
        """Wait until a JavaScript expression is true."""
        poll = f"""async () => {{
          while (!({condition})) await new Promise((next) => setTimeout(next, 10));
        }}"""
        self.result(poll, seconds=seconds, of=condition)

    def result(self, function: str, arg=None, seconds: int = PATIENCE, of: str = ""):
        """Call an asynchronous JavaScript function in the page. It must end within this time.

        arg: for the function. of: what to call it in the message of a failure.
        """
        limited = f"""(arg) => Promise.race([
          ({function})(arg).then((result) => ({{ result }})),
          new Promise((end) => setTimeout(end, {1000 * seconds}, null)),
        ])"""
        ended = self.page.evaluate(limited, arg)
        if ended is None:
            state = self.page.evaluate(STATE) | {"said": self.page.evaluate(SAID)}
            pytest.fail(f"not in {seconds} s: {of or function}\n{state}")
        return ended.get("result")

    def state(self) -> dict:
        """When it is settled: the text, its tokens' ids, which is selected, the bars by token id, and the complaint."""
        self.settle()
        state = self.page.evaluate(STATE)
        return state | {"bars": {int(id): float(p) for id, p in state["bars"]}}


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
    view = opened()
    assert view.page.evaluate("KERNEL !== null")  # WebAssembly is allowed
    view.page.focus("#text")
    view.page.keyboard.press("Control+End")
    for letter in ("", "i", "s"):
        view.page.keyboard.type(letter)
        assert_shows(view, *load(runs))
    assert view.state()["text"] == "Akis" and len(view.state()["bars"]) == 8


def test_the_page_says_that_a_bar_appends_its_token_and_what_its_percentage_does(opened):
    view = opened()
    hint = view.page.locator("#prediction p")
    assert hint.inner_text() == "A bar appends its token. A percentage shows how it was computed."
    view.page.locator("#tokens button").nth(0).click()
    assert hint.inner_text().startswith("A bar goes on from here with its token.")
    view.page.locator("#bars .choose").nth(0).click()
    view.settle()
    text = view.page.input_value("#text")
    assert len(text) == 2 and text[0] == START[0]


def test_of_several_members_it_shows_the_first_and_says_so(opened, runs):
    view = opened("members")
    model, tokenizer = load(runs, "members")
    assert_shows(view, model.members[0], tokenizer)
    about = view.page.text_content("#about")
    assert about.startswith("GPT, the first of 2 members: 2 layers")
    assert "nats a token of their average" in about


def ids_in_context(tokenizer, text: str, block_size: int = 32) -> list[int]:
    """The tokens of a text that sample.py still sees when it has written this far."""
    ids = tokenizer.encode(text or "\n").tolist()
    while len(ids) > block_size:
        ids = ids[block_size + 1 - block_size // 2 :]
    return ids


def assert_shows(view, model, tokenizer) -> None:
    """The bars are PyTorch's for the characters in the field that it knows, and for the selected token."""
    state = view.state()
    shown, t = state["bars"], state["t"]
    known = "".join(char for char in state["text"] if char in tokenizer.alphabet)
    ids = ids_in_context(tokenizer, known)
    assert state["ids"] == ids and t >= 0
    assert bool(state["complaint"]) == (known != state["text"])
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0][0, t, : tokenizer.vocab_size]
    probs = logits.softmax(dim=-1)
    assert shown == pytest.approx({id: probs[id].item() for id in shown}, abs=1e-6)
    assert min(shown.values()) >= probs.topk(8).values[-1].item() - 1e-6


def test_continue_writes_what_sample_py_writes_when_the_context_is_full_too(opened, runs):
    model, tokenizer = load(runs)
    view = opened()
    prompt = tokenizer.encode(START).tolist()
    (written,) = generate(model, [prompt], 40, tokenizer.vocab_size, temperature=0)
    expected = START + tokenizer.decode(written)
    view.page.check("#greedy")
    view.page.click("#write-one")
    view.settle()
    assert view.page.input_value("#text") == expected[:3]
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
  const ask = (topic, message) => computer.answer({ topic, id: id++, source: "", ...message });
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
    beyond, computed, answered = view.result(COMPUTER)
    assert beyond == [1]  # the newest half of a full context is ready
    assert answered == 1 and computed <= 20 * 16 + 16  # of 20 texts, half, and of the last one all
    view.page.focus("#text")
    view.page.keyboard.type("kis osal")
    view.settle()
    assert view.page.evaluate("rows") == []  # the thread that paints computed nothing


ADDRESSES = {
    "#section=mlp&number=stack.nothing:1,2&number=stack.norm.output:999,1&text=Akis": "Akis",
    "#section=nonsense&t=x&key=-7&number=abc&number=idx:1&number=stack.norm.mean:9": START,
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


def test_a_character_that_the_model_does_not_know_is_struck_and_skipped(opened, runs):
    model, tokenizer = load(runs)
    view = opened()
    view.page.fill("#text", "ékA ké")
    assert_shows(view, model, tokenizer)
    assert view.page.inner_text("#tokens").split() == ["é", "k", "A", "␣", "k", "é"]
    assert view.page.locator("#tokens s").all_inner_texts() == ["é", "é"]
    told = view.page.inner_text("#problem")
    assert told.startswith("This model does not know “é”: it is skipped.")
    assert " ".join(sorted(set(tokenizer.alphabet) - {"\n", " "})) in told
    view.page.locator("#tokens button").nth(1).click()
    assert_shows(view, model, tokenizer)
    view.until("decodeURI(location.hash).includes('é')")
    view.page.reload()
    assert_shows(view, model, tokenizer)
    assert view.page.input_value("#text") == "ékA ké"


def back(view) -> None:
    view.result(
        "() => new Promise((done) => { addEventListener('hashchange', () => done(), { once: true }); history.back(); })"
    )
    view.settle()


def test_a_second_enter_leads_into_the_drawer_and_escape_back(opened):
    view = opened(hash="#section=embeddings")
    view.page.focus("#embeddings .strip canvas")
    view.page.keyboard.press("ArrowRight")
    view.page.wait_for_selector("#drawer >> text=Press Enter again to move in here")
    view.page.keyboard.press("Enter")
    assert view.page.evaluate("document.activeElement.closest('#drawer') !== null")
    view.page.keyboard.press("Escape")
    assert view.page.evaluate("document.activeElement.matches('#embeddings canvas')")


def test_the_focus_is_never_under_the_bars(opened):
    view = opened(hash="#section=softmax")
    view.page.focus("#softmax .scroll")
    top = "document.activeElement.getBoundingClientRect().top"
    for _ in range(12):
        view.page.keyboard.press("Shift+Tab")
        view.until(f"{top} > 0 || document.activeElement.closest('#top')")
        inside = "document.activeElement.closest('main') !== null"
        if view.page.evaluate(inside):
            bars = "document.getElementById('sections-part').getBoundingClientRect().bottom"
            assert view.page.evaluate(f"{top} >= {bars}")


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
    for title in (second, first):
        back(view)
        assert head.inner_text() == title
    view.page.keyboard.press("Escape")
    assert not view.page.locator("#drawer").is_visible()
    for _ in range(3):
        back(view)
    assert view.page.inner_text("#sections [aria-current=true]").strip() == "Model"
    view.page.evaluate("history.go(1)")
    view.until("location.hash.includes('temperature=0.5')")


def test_a_translation_is_written_on_opening_and_says_what_it_does_not_read(opened, runs):
    view = opened("pairs")
    view.settle()
    assert len(view.page.input_value("#text")) > 1
    view.until("document.getElementById('ended').textContent !== ''")
    assert view.page.inner_text("#ended").startswith("The context is full")
    view.page.fill("#source", "Haus " * 20)
    view.page.wait_for_selector("#problem:not(:empty)")
    assert view.page.inner_text("#problem").startswith(
        "The context has no room for the last 60 tokens of the sentence: they are not read."
    )


SHOWN_IN = {
    "stack.blocks.1.attn_norm.mean:1": ("norm", None),
    "stack.blocks.1.mlp_norm.output:1,3": ("norm", "after"),
    "stack.blocks.1.feed_forward.input:1,3": (
        "norm",
        "after",
    ),  # of the norm before the MLP
    "stack.blocks.1.feed_forward.up_proj:1,3": ("mlp", "neurons, before activation"),
    "stack.blocks.1.attn.scores:1,1,0": ("attention", None),
    "stack.blocks.1.attn.o_proj:1,3": ("attention", "after the projection"),
    "stack.blocks.0.after_mlp:1,3": ("residual", "after MLP"),
    "wte:1,3": ("embeddings", "token embedding"),
    "logits:1,3": ("softmax", None),
    "stack.norm.output:1,3": ("gpt", "what the output head reads"),
}


FOLLOW = """hash => new Promise((done) => {
  addEventListener("hashchange", () => done(), { once: true });
  location.hash = hash;
})"""


def test_a_section_comes_to_the_top_when_it_is_chosen_while_a_number_is_open(opened):
    view = opened(hash="#section=embeddings", viewport={"width": 1366, "height": 625})
    for there, back in [("Attention", "Embeddings"), ("One step", "Softmax")]:
        for name in (there, back):
            view.page.locator("#bars .number").first.click()
            view.page.wait_for_selector("#drawer", state="visible")
            view.result(FRAMES)
            view.page.click(f"#sections button:has-text('{name}')")
            view.result(FRAMES)
            bars = view.page.locator("#sections-part").bounding_box()
            title = view.page.evaluate("document.activeElement.getBoundingClientRect().top")
            assert 0 <= title - bars["y"] - bars["height"] < 90, name


def test_the_drawer_leads_to_the_section_that_shows_its_number(opened):
    view = opened(hash="#text=Akis")
    for number, (section, strip) in SHOWN_IN.items():
        view.result(FOLLOW, f"#section=leaf&text=Akis&number={number}")
        view.settle()
        title = view.page.inner_text("#arithmetic h3")
        link = view.page.locator("#arithmetic button", has_text="Show in section")
        chip = f"#sections button:has-text('{link.inner_text().split()[3]}')"
        chip = view.page.locator(chip).first.inner_text()
        link.click()
        view.settle()
        view.result(FRAMES)
        assert view.page.locator("#sections [aria-current=true]").inner_text() == chip
        assert view.page.inner_text("#arithmetic h3") == title
        panel = view.page.locator(f"#{section}")
        assert view.page.evaluate(f"location.hash.includes('section={section}&')"), number
        if strip:
            shown = panel.locator(".strip", has_text=strip).filter(has_text="3: ")
            shown.first.wait_for()
            box, size = shown.first.bounding_box(), view.page.viewport_size
            assert 100 < box["y"] < size["height"] - 30, number


def test_a_number_keeps_its_height_when_the_drawer_opens_beside_it_and_closes(opened):
    for width in (1280, 1440):
        view = opened(hash="#section=mlp", viewport={"width": width, "height": 900})
        strip = view.page.locator("#mlp canvas").nth(2)
        strip.scroll_into_view_if_needed()
        view.page.evaluate(FRAMES)
        heights = [strip.bounding_box()["y"]]
        strip.click(position={"x": 50, "y": 5})
        view.page.wait_for_selector("#drawer")
        for key in ("Shift", "Escape"):
            view.result(FRAMES)
            heights.append(strip.bounding_box()["y"])
            view.page.keyboard.press(key)
        assert heights == pytest.approx([heights[0]] * 3, abs=2), width


FRAMES = """async () => {
  for (let frame = 0; frame < 6; frame++) await new Promise(requestAnimationFrame);
}"""


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

    def press(self) -> None:
        self.page.focus("#text")
        self.page.keyboard.press(self.draw.choice(["Backspace", "Home", "Delete"]))

    def paste(self) -> None:
        pasted = self.draw.choices("Akis osal\n", k=self.draw.randrange(60))
        self.page.fill("#text", "".join(pasted))

    def click(self, selector: str) -> None:
        """With the mouse, on one of those that can be seen, brought into view; nothing may cover it then."""
        at = self.view.result(INTO_VIEW, [selector, self.draw.random()])
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
        width, height = self.draw.choice([390, 800, 1440]), self.draw.choice([600, 900])
        self.page.set_viewport_size({"width": width, "height": height})

    CLICKED = (
        "#tokens button",
        "#sections button",
        "#flow button",
        "#bars .choose",
        "#bars .number",
        "#arithmetic button:not([disabled])",
    )
    CLICKS = (lambda self, on=selector: self.click(on) for selector in CLICKED)
    OFTEN = (type, press, *CLICKS)
    ACTIONS = (*OFTEN * 3, *(paste, write, escape, back) * 2, reload, resize)

    def step(self) -> None:
        self.draw.choice(self.ACTIONS)(self)


@pytest.mark.parametrize("actions", [15, pytest.param(2_000, marks=pytest.mark.long)], ids=str)
def test_after_any_actions_the_numbers_are_those_of_the_text(opened, runs, actions):
    model, tokenizer = load(runs)
    view = opened(reduced_motion="reduce")  # no frames but for what changes
    walk = Walk(view, seed=actions)
    for _ in range(actions):
        walk.step()
        assert_shows(view, model, tokenizer)
        assert view.console == []


DRAWERS = """async ([addresses, query]) => {
  const found = {};
  for (const address of addresses) {
    await new Promise((done) => {
      addEventListener("hashchange", done, { once: true });
      location.hash = `#${query}&number=${address}`;
    });
    found[address] = document.querySelector("#arithmetic .value").textContent;
  }
  return found;
}"""


def addresses(trace: dict, n: int) -> list[tuple[str, float]]:
    """Addresses and values of n numbers of a trace, chosen at random."""
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
        ("run", 25),
        ("pairs", 15),
        pytest.param("run", 50, marks=pytest.mark.long),
        pytest.param("pairs", 30, marks=pytest.mark.long),
    ],
)
def test_the_drawer_shows_pytorchs_numbers(opened, runs, run, n):
    model, tokenizer = load(runs, run)
    text, source = {"run": ("Akis osal", None), "pairs": ("Where", "Wo wohnst du?")}[run]
    idx = tokenizer.encode(text).tolist()
    if source:
        idx.insert(0, tokenizer.eot)
        source = [*tokenizer.encode(source).tolist(), tokenizer.eot]
    view = opened(run, f"#section=leaf&text={text}")
    chosen = dict(addresses(expected_trace(model, idx, source, tokenizer.vocab_size), n))
    query = [list(chosen), f"section=leaf&text={text}"]
    for address, shown in view.result(DRAWERS, query).items():
        value = chosen[address]
        unit = abs(value) / 10 if "e" in shown else 10.0 ** -len(shown.partition(".")[2])
        number = float(shown.replace("−", "-").replace("∞", "inf"))
        assert abs(number - value) <= unit, address


def test_the_leaf_network_is_trained_to_95_percent_stops_and_explodes_with_a_reason(opened):
    from playwright.sync_api import expect

    view = opened(hash="#section=training")
    panel = view.page.locator("#training")
    click = lambda name: panel.get_by_role("button", name=name).click()  # noqa: E731
    click("Run")
    reached = re.compile(r"^(1|0\.9[5-9].*)$")
    accuracy = expect(panel.locator("[data-accuracy]"))
    accuracy.to_have_attribute("data-accuracy", reached, timeout=30_000)
    click("Stop")
    click("Start over")
    panel.locator("input[type=range]").fill("3")
    for _ in range(20):
        click("Step")
    assert "Exploded" in panel.locator(".status").inner_text()


CONTROLS = "button:not([disabled], #skip, .more, #tokens *), select, input, textarea, summary"
CONTROLS += ", canvas[tabindex], .scroll"
ONCE = {"button": "Enter", "summary": "Enter", "checkbox": " ", "textarea": "k"}
KEYS = {kind: (key,) for kind, key in ONCE.items()} | {
    "div": ("ArrowRight",),
    "range": ("ArrowRight", "ArrowLeft"),
    "select": ("ArrowDown", "ArrowUp"),
    "canvas": ("ArrowRight", "ArrowUp", "ArrowLeft"),
}
WATCH = """controls => {
  addEventListener("focusin", ({ target }) => (target.seen = true));
  window.visible = () => [...document.querySelectorAll(controls)].filter((control) => control.checkVisibility());
  window.state = () => [control.value, control.checked, control.ariaValueText, document.getElementById("text").value];
  return visible().length;
}"""
FOCUS = """i => {
  window.control = visible()[i];
  if (!control) return [null, "", "", ""];
  control.focus();
  const kind = { checkbox: "checkbox", range: "range", file: "file" }[control.type] ?? control.localName;
  const alike = control.className && `${control.className} in ${control.parentElement.closest("[id]").id}`;
  return [kind, control.outerHTML.slice(0, 300), alike, state().join()];
}"""
FOCUSED_NOW = "document.activeElement !== document.body"
AFTER = "() => [state().join(), control.textContent]"


@pytest.mark.parametrize("run", ["playground", *(pytest.param(run, marks=pytest.mark.long) for run in RUNS)])
def test_tab_leads_to_every_control_and_each_obeys_its_keys_and_keeps_the_focus(opened, run):
    view = opened(run, "#section=gpt&number=logits:0,1", viewport={"width": 1440, "height": 300})
    press, ask = view.page.keyboard.press, view.page.evaluate
    # the selected token, what sections have more when they come into view, and once around
    for _ in range(ask(WATCH, CONTROLS) + 40):
        press("Tab")
    # of several sections, the one that is being read is the stop
    missed = "visible().filter((it) => !it.seen && it.tabIndex >= 0 && !it.closest('#sections'))"
    assert ask(f"{missed}.map((control) => control.outerHTML)") == []
    tried = Counter()
    for number in range(1000):
        kind, label, alike, before = ask(FOCUS, number)
        if not kind:
            break
        tried[alike] += 1
        if alike and tried[alike] > 2:  # of many operands or thumbnails in one place, two are enough
            continue
        # a key opens the browser's own window; a slider with one place
        if kind == "file" or 'max="0"' in label:
            continue
        for key in KEYS[kind]:
            press(key)
            after, text = ask(AFTER)
            if after != before:
                break
        assert after != before or kind in ("button", "summary", "div"), label
        if text == "Train":  # a large model, after all these keys
            view.until(f"control.textContent === 'Pause' || {AT_REST}")
        if text in ("Stop", "Pause", "Train"):
            press("Enter")
        elif text == "Try it":
            view.page.click("text=Pause")
        view.settle()
        assert ask(FOCUSED_NOW), label
    assert number > 60


def test_a_control_keeps_the_focus_when_the_model_becomes_another_one(opened):
    view = opened("playground", "#section=gpt&number=logits:0,1")

    def press(name: str) -> None:  # while the focus is elsewhere
        view.page.locator(f"#playground >> text={name}").evaluate("it => it.click()")
        view.settle()

    for control in ("#arithmetic .operand >> nth=3", "#arithmetic summary"):
        view.page.focus(control)
        press("Start over")
        assert view.page.locator(control).evaluate("it => it === document.activeElement")
    for width, control in {"16": "#arithmetic summary", "32": "#gpt select"}.items():
        view.page.locator("[data-knob=n_embd] select").select_option(label=width)
        view.page.focus(control)
        press("Start over")
        assert view.page.evaluate(FOCUSED_NOW)
    assert not view.page.is_visible("#drawer")
    view.page.focus(".samples button")  # that of step 0
    press("One step")
    assert view.page.evaluate(FOCUSED) == "0"


FOCUSED = "document.activeElement.textContent"


def test_a_few_tabs_or_a_skip_lead_past_the_picture_and_arrow_keys_through_it(opened):
    view = opened()
    press, ask = view.page.keyboard.press, view.page.evaluate
    press("Tab")
    assert ask(FOCUSED) == "Skip to section 1" and view.page.is_visible("#skip")
    press("Enter")
    assert ask("document.activeElement.id") == "title-leaf"
    ask("scrollTo(0, 0)")
    view.page.focus("#text")
    for stop in (
        "#write-one",
        "#go-on",
        "#tour-start",
        "#greedy",
        "#tokens",
        "#flow",
        "#bars",
        "#sections",
    ):
        press("Tab")
        assert ask(f"document.activeElement.closest('{stop}') !== null"), stop
        walked = view.page.locator(f"{stop} button").all_text_contents()
        if stop in ("#flow", "#bars", "#sections"):
            press("Home")
            for text in walked:
                assert ask(FOCUSED) == text
                press("ArrowRight")
    press("Tab")
    assert ask("document.activeElement.closest('main') !== null")


IN_SIGHT = """[...document.querySelectorAll("#sections button")].filter((chip) => {
  const { left, right } = chip.getBoundingClientRect();
  const room = document.getElementById("sections").getBoundingClientRect();
  return left >= room.left && right <= room.right;
}).map((chip) => chip.textContent)"""


def test_every_section_is_in_sight_or_can_be_scrolled_to(opened):
    wide = opened()
    chips = wide.page.locator("#sections button").all_text_contents()
    assert wide.page.evaluate(IN_SIGHT) == chips and len(chips) == 17
    phone = opened(viewport={"width": 390, "height": 844})
    seen = phone.page.evaluate(IN_SIGHT)
    assert len(seen) < 17
    for _ in range(17):
        phone.page.evaluate("document.getElementById('sections').scrollLeft += 200")
        phone.settle()
        seen += phone.page.evaluate(IN_SIGHT)
    assert set(seen) == set(chips)


def test_nothing_moves(opened):
    moving = """() => [...document.querySelectorAll("*")].filter((e) => {
      const { transitionDuration, animationName, scrollBehavior } = getComputedStyle(e);
      return !/^0s(, 0s)*$/.test(transitionDuration) || animationName !== "none" || scrollBehavior !== "auto";
    }).length"""
    view = opened(hash="#section=gpt", reduced_motion="no-preference")
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
        ("playground", "light"),
        pytest.param("playground", "dark", marks=pytest.mark.long),
    ],
)
def test_axe_finds_nothing(opened, run, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    view = opened(run, "#section=gpt", color_scheme=scheme)
    assert_axe_finds_nothing(axe, view)
    view.page.locator("#bars .number").nth(0).click()
    assert_axe_finds_nothing(axe, view, "#drawer")
    if run == "run":
        view.page.set_viewport_size({"width": 390, "height": 844})
        assert_axe_finds_nothing(axe, view)
        view.page.fill("#text", "Aké")
        view.settle()
        assert_axe_finds_nothing(axe, view, "#top")


def assert_axe_finds_nothing(axe, view: Opened, part: str = "html") -> None:
    options = {
        "rules": {"label-content-name-mismatch": {"enabled": True}},
        "resultTypes": ["violations"],  # to describe what is well takes as long again
    }
    found = axe.Axe().run(view.page, part, options).response["violations"]
    assert {rule["id"]: [node["html"][:120] for node in rule["nodes"][:3]] for rule in found} == {}


@pytest.mark.parametrize("run", ["run", "pairs", "window", "playground"])
def test_nothing_scrolls_sideways(opened, run):
    narrow = {"width": 360, "height": 900}
    view = opened(run, "#section=gpt", viewport=narrow, device_scale_factor=2)
    view.page.locator("#bars button").nth(1).click()
    for size in (narrow, {"width": 720, "height": 450}, {"width": 768, "height": 900}):
        view.page.set_viewport_size(size)
        view.result(FRAMES)
        root = "document.documentElement"
        assert view.page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth"), size


BESIDE = """() => {
  const box = (node) => node.getBoundingClientRect();
  const apart = ([a, b]) => [box(b).left - box(a).right, box(b).top - box(a).top];
  const all = (selector) => [...document.querySelectorAll(selector)];
  const heads = all("main .strip-head").filter((head) => head.checkVisibility() && head.children[1].textContent);
  return {
    columns: apart(["#residual p.quiet", "#residual .strip"].map((name) => document.querySelector(name)))[0] > 0,
    ranges: Math.max(...heads.map((head) => apart(head.children)).filter(([, below]) => below < 5).map(([x]) => x)),
    ems: Math.max(...all(".texts p").map((text) => box(text).width / 16)),
  };
}"""


def test_text_is_beside_its_pictures_if_there_is_room_and_ranges_beside_their_titles(
    opened,
):
    view = opened()
    for width in (390, 1440, 1920):
        view.page.set_viewport_size({"width": width, "height": 900})
        found = view.page.evaluate(BESIDE)
        assert found["columns"] == (width > 400)
        assert 0 < found["ranges"] < 30
        assert found["ems"] < 38  # at most 75 characters


@pytest.mark.long
def test_the_time_until_a_keystroke_is_painted_is_measured_in_each_case(browser, runs, monkeypatch):
    monkeypatch.setattr(keystrokes, "FIRST_KEYS", 0)
    figures = keystrokes.time_page(browser, runs / "out/run/explain.html", 2)
    for where in ("appended", "anywhere"):
        for size in ("64", "full", "beyond"):
            case = figures[f"{where}_{size}"]
            assert 0 < case["median_ms"] <= case["p95_ms"]
    assert figures["burst"]["ms"] > 0 and figures["continued"]["tokens_per_s"] > 0


def test_a_section_for_which_the_run_has_nothing_names_a_command_that_trains_one(opened):
    view = opened("window", "#section=transformer")
    commands = view.page.eval_on_selector_all(".missing code", "all => all.map((item) => item.textContent)")
    assert len(commands) >= 7
    for command in commands:
        config = re.fullmatch(r"python train.py (config/[\w/.-]+)", command)[1]
        assert (Path(explain.__file__).parent / config).exists()


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


def test_a_slider_goes_through_the_training_from_its_first_step_to_the_model_of_now(opened, runs):
    model, tokenizer = load(runs)
    text = "Akis unat"
    ids = tensor_of(tokenizer, text)
    saved = load_plain(runs / "out/run/snapshots/0.pt")["rows"]
    view = opened("run", f"#section=learned&text={text}")
    strip = view.page.get_by_role("slider", name="Loss of each token")
    for number, (words, then) in enumerate([("After step 0 ", restored(saved, model)), ("After step 6 ", model)]):
        slide(view, "learned", number)
        with torch.no_grad():
            first = then(ids)[0][0, 0].log_softmax(-1)
            loss = mean_loss(then, ids).item()
        assert status(view, "learned", words) == pytest.approx(loss, abs=1e-5)
        strip.focus()
        view.page.keyboard.press("Home")
        view.page.keyboard.press("ArrowRight")
        assert strip.get_attribute("aria-valuetext") == f"“k”: {-first[ids[0, 1]]:.4f}"


def test_what_a_step_of_training_knew_of_a_text_follows_the_text_while_it_is_written(opened, runs):
    model, tokenizer = load(runs)
    view = opened("run", f"#section=learned&text={START}")
    slide(view, "learned", 1)
    status(view, "learned", "After step 6 ")
    view.page.evaluate(
        """() => {
      const panel = document.getElementById("learned");
      window.seen = [];
      new MutationObserver(() => {
        if (document.getElementById("go-on").textContent === "Stop")
          seen.push([panel.querySelector(".losses").textContent, panel.querySelector("[role=status]").dataset.loss]);
      }).observe(document.getElementById("page"), { childList: true, subtree: true });
    }"""
    )
    view.page.click("#go-on")
    view.until("document.getElementById('go-on').textContent === 'Continue'", 100)
    view.settle()
    written = view.page.evaluate("seen")
    shown = {text: float(loss) for text, loss in written if loss}
    assert len(shown) > 2, written
    now = view.page.text_content("#learned .losses")
    ids = view.page.eval_on_selector_all("#tokens button", "all => all.map((it) => +it.dataset.id)")
    assert now.replace("␣", " ").replace("⏎", "\n") == tokenizer.decode(ids)
    loss = view.page.locator("#learned [role=status]").get_attribute("data-loss")
    shown[now] = float(loss)
    for text, loss in shown.items():
        ids = tensor_of(tokenizer, text.replace("␣", " ").replace("⏎", "\n"))
        with torch.no_grad():
            assert loss == pytest.approx(mean_loss(model, ids).item(), abs=1e-4)


def test_steps_of_the_page_are_pytorchs_and_a_step_can_be_gone_back_to(opened, runs):
    model, tokenizer = load(runs)
    ids = tensor_of(tokenizer, "Akis unat")
    config = TrainConfig(**load_plain(runs / "out/run/best.pt")["train_config"])
    optimizer = make_optimizer(config, model)
    losses = []
    for step in range(4):
        set_lr(optimizer, config.lr(step) / config.learning_rate)
        loss = mean_loss(model, ids)
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
    view = opened()
    view.page.click("summary")
    view.page.get_by_label("The text that it learns").fill("Akis unat")
    for step, loss in enumerate(losses, 1):
        view.page.click("text=One step")
        view.page.wait_for_selector(f"text=/Step {6 + step}: /")
        assert trained_loss(view) == pytest.approx(loss, abs=1e-3)
    assert losses[3] < losses[0]
    view.page.click(".samples button >> text=8")
    view.page.wait_for_selector("text=/Step 8: /")
    view.page.click("text=One step")
    view.page.wait_for_selector("text=/Step 9: /")
    assert trained_loss(view) == pytest.approx(losses[2], abs=1e-3)


def trained_loss(view: Opened) -> float:
    """The mean loss of the training here, which has a point for each step."""
    return float(view.page.locator(".chart-key .key-0").first.inner_text().split()[1].rstrip(","))


def test_a_number_of_the_gradient_opens_to_its_sum_over_the_tokens(opened, runs):
    model, tokenizer = load(runs)
    ids = tensor_of(tokenizer, "Akis unat")
    mean_loss(model, ids).backward()
    expected = model.get_parameter("stack.blocks.0.mlp.up_proj.weight").grad[0, 3].item()
    view = opened("run", "#section=step&text=Akis unat")
    strip = view.page.get_by_role("slider", name="Derivative of the loss by each weight")
    strip.focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowRight", "Enter"):
        view.page.keyboard.press(key)
    value = view.page.locator("#arithmetic .value")
    value.wait_for()
    assert float(value.get_attribute("data-value")) == pytest.approx(expected, rel=1e-4)
    rows = view.page.locator("#arithmetic tr[data-term]")
    terms = [float(row.get_attribute("data-term")) for row in rows.all()]
    assert sum(terms) == pytest.approx(expected, rel=1e-3)


def test_a_run_with_an_optimizer_of_ones_own_is_shown_but_not_trained(opened, runs):
    data = page_data(runs / "out/run/best.pt", START)
    data["training"]["optimizer"] = "mine"
    (runs / "out/own").mkdir()
    (runs / "out/own/explain.html").write_bytes(fill("page.html", to_text(data)))
    view = opened("own", "#panel=step")
    assert_shows(view, *load(runs))
    words = "by the optimizers and schedules that HumptyGPT came with"
    assert words in view.page.text_content("main, body")
    assert not view.page.inner_html("#playground")
    assert opened().page.inner_html("#playground")


def test_a_page_whose_logits_are_not_pytorchs_says_so_instead_of_showing_the_model(browser, runs, tmp_path):
    data = page_data(runs / "out/run/best.pt", START)
    data["check"]["idx"].reverse()
    (tmp_path / "page.html").write_bytes(fill("page.html", to_text(data)))
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/page.html")
    page.wait_for_selector("text=This page would show other numbers than model.py")
    assert not page.is_visible("#page")
    page.close()
