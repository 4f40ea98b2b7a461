"""The page of a run in a real browser, offline: what it shows is PyTorch's, and hands that have no mouse can use it.

Needs Chromium (Debian: apt-get install chromium) and the packages playwright and axe-playwright-python.
"""

import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, WITHOUT_SAMPLE
from test_explain import expected_trace, rounded
from texts import make_pairs, make_text

import bench
import explain
import prepare_data
import train
from benchmarks import keystrokes
from humptygpt.core.errors import UserError
from humptygpt.generation.sampling import generate
from humptygpt.generation.tasks import TASKS
from humptygpt.interchange import load as interchange
from humptygpt.training import run_folder

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
        patch.setitem(TASKS, "language modelling", WITHOUT_SAMPLE)
        Path("tiny.txt").write_text(make_text())
        Path("pairs.tsv").write_text(
            "".join(f"{source}\t{target}\n" for source, target in make_pairs())
        )
        prepare_data.main(["--input=tiny.txt", "--name=tiny"])
        prepare_data.main(["--input=pairs.tsv", "--name=pairs", "--tokenizer=byte"])
        train.main([*TINY_RUN, "--block_size=32", "--position=rotary"])
        pairs = [
            "--dataset=pairs",
            "--out_dir=out/pairs",
            "--block_size=40",
            "--model=transformer",
        ]
        train.main(
            [*TINY_RUN, *pairs, "--position=sinusoidal", "--norm=rmsnorm", "--mlp=gated"]
        )
        window = [
            "--out_dir=out/window",
            "--model=window_mlp",
            "--window=4",
            "--block_size=32",
        ]
        train.main([*TINY_RUN, *window])
        explain.main(["--out_dir=out/run", f"--start={START}"])
        explain.main(["--out_dir=out/pairs", "--start=Wo wohnst du?"])
        explain.main(["--out_dir=out/window", f"--start={START}"])
    return folder


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
        self.page.wait_for_selector("#page[aria-busy=false]")

    def shown(self) -> dict[int, float]:
        """The probabilities of the bars, by token ids."""
        self.settle()
        bars = self.page.eval_on_selector_all(
            "#bars button", "all => all.map((bar) => [bar.dataset.id, bar.dataset.p])"
        )
        return {int(id): float(p) for id, p in bars}

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
        others = [url for url in each.requests[1:] if not url.startswith("blob:")]
        assert each.console == [] and others == []


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
    view.select(section="writing")
    for _ in range(12):
        view.page.click("#write-one")
        view.settle()
    assert view.page.input_value("#text") == START + tokenizer.decode(written)


def test_text_that_has_no_tokens_is_reported_and_its_numbers_are_gone(opened):
    view = opened()
    view.page.fill("#text", "Aké")
    assert view.page.inner_text("#problem").startswith(
        "character 'é' (U+00E9) is not among the "
    )
    assert not view.shown()
    view.page.fill("#text", "Ak")
    assert view.page.is_hidden("#problem") and view.shown()


def drawer(view: Opened) -> dict:
    """The number that the drawer shows, its terms, and the results below them."""
    read = """() => {
      const rows = [...document.querySelectorAll("#arithmetic .terms")][0].rows;
      const terms = [...rows].filter((row) => row.dataset.term !== undefined).map((row) => +row.dataset.term);
      const value = document.querySelector("#arithmetic .value");
      const results = [...rows].filter((row) => row.className === "sum").map((row) => row.lastChild.textContent);
      return { value: +value.dataset.value, shown: value.textContent, terms, results };
    }"""
    return view.page.evaluate(read)


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


@pytest.mark.parametrize(("run", "n"), [("run", 120), ("pairs", 80)])
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
    for address, value in addresses(
        expected_trace(model, idx, source, tokenizer.vocab_size), n
    ):
        view.select(number=address)
        y = drawer(view)
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
    view.page.get_by_role("button", name="6: Self-attention").click()
    view.page.locator("#attention select").nth(0).select_option(label="2")
    view.page.locator("#attention canvas[tabindex]").nth(0).click(position={"x": 30, "y": 5})
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
    assert "token embedding, token 0, feature 2" in view.page.inner_text("#arithmetic h3")
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
        "canvas": ("ArrowRight", "ArrowUp"),
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


@pytest.mark.parametrize("run", ["run", "pairs"])
def test_tab_leads_to_every_control_and_each_obeys_its_keys_and_keeps_the_focus(
    opened, run
):
    view = opened(
        run, "#section=gpt&number=logits:0,1", viewport={"width": 1440, "height": 300}
    )
    press, ask = view.page.keyboard.press, view.page.evaluate
    for _ in range(ask(WATCH, CONTROLS) + 5):  # the selected token, and once around
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
    [("run", "light"), ("run", "dark"), ("pairs", "light"), ("window", "dark")],
)
def test_axe_finds_nothing(opened, run, scheme):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs axe-playwright-python"
    )
    view = opened(run, "#section=gpt", color_scheme=scheme)
    view.page.locator("#bars button").nth(1).click()
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
