"""The page that trains, in a real browser, offline: what a person does with it, and what it says to bad input.

Needs Chromium and playwright, as tests/test_explain_page.py.
"""

import re
from pathlib import Path

import pytest
from humptygpt.model import ModelConfig
from test_explain_page import Opened, assert_shows, trained_loss

import explain
import sample
from humptygpt import cli
from humptygpt.data.builtin import data_set
from humptygpt.formats import load as loading
from humptygpt.page import page_data
from humptygpt.training.settings import TrainConfig

pytestmark = pytest.mark.page
TEXT = "The text that it learns"
MORE = "document.querySelector('#playground details').open = true"
START = "Humpty Dumpty sat"
SMALL = {"n_layer": 1, "n_embd": 16, "block_size": 16, "max_iters": 100}

RHYME = data_set("humpty_dumpty").RHYME


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    path = tmp_path_factory.mktemp("playground") / "playground.html"
    explain.main([f"--playground={path}"])
    return path


@pytest.fixture
def opened(browser, playground):
    """Opens the playground; afterwards its console must be empty, and it must have asked for nothing but itself."""
    made = []

    def open_page(path: Path = playground) -> Opened:
        made.append(Opened(browser, path))
        return made[-1]

    yield open_page
    for each in made:
        each.context.close()
        others = [url for url in each.requests if not url.startswith("blob:")]
        assert each.console == [] and len(set(others)) == 1


def choose(view: Opened, **knobs) -> None:
    view.page.evaluate(MORE)
    for name, value in knobs.items():
        knob = view.page.locator(f"[data-knob={name}] select")
        knob.select_option(label=f"{value}")


def choose_text(view: Opened, name: str) -> None:
    view.page.get_by_label("Text", exact=True).select_option(label=name)


# seen from inside the page, because a short training ends between two looks from outside
TO_THE_END = """button => new Promise((done) => {
  let begun = false;
  new MutationObserver(() => {
    begun ||= button.textContent === "Pause";
    if (begun && button.textContent === "Train") done();
  }).observe(button, { childList: true });
  button.click();
})"""


def train_to_the_end(view: Opened) -> None:
    button = view.page.get_by_role("button", name="Train", exact=True).element_handle()
    view.result(TO_THE_END, button, seconds=100)
    view.settle()


def step_of(view: Opened) -> int:
    return int(re.search(r"Step ([\d,]+)", view.page.inner_text(".playing .status"))[1])


def said(view: Opened) -> str:
    return view.page.locator(".playing [role=status]").last.inner_text()


def saved(view: Opened, name: str) -> Path:
    with view.page.expect_download() as download:
        view.page.get_by_role("button", name=name).click()
    path = Path(download.value.path()).with_name(name)
    download.value.save_as(path)
    return path


@pytest.mark.parametrize(
    "knobs",
    [
        {"n_layer": 1, "n_embd": 32, "learning_rate": 0.01},
        pytest.param({}, marks=pytest.mark.long),
    ],
)
def test_it_learns_the_rhyme_and_sample_py_recites_it_from_the_saved_file(opened, capsys, knobs):
    view = opened()
    choose(view, **knobs)
    train_to_the_end(view)
    assert RHYME.split("\n")[2] in view.page.inner_text(".samples li:first-child")
    path = saved(view, "playground.pt")
    loaded = loading.load(path)
    assert_shows(view, loaded.model, loaded.tokenizer)
    rest = len(RHYME.strip()) - len(START)
    keys = ["--temperature=0", f"--max_new_tokens={rest}", "--device=cpu"]
    sample.main([f"--out_dir={path}", f"--start={START}", *keys])
    assert capsys.readouterr().out.strip() == RHYME.strip()
    given = cli.read([f"{saved(view, 'playground.py')}"], TrainConfig, ModelConfig)
    trained = loaded.saved["train_config"] | loaded.saved["model_config"]
    recipe = {**vars(TrainConfig()), **vars(ModelConfig()), **given}
    assert {key for key in trained if trained[key] != recipe[key]} == {
        "dataset",
        "out_dir",
        "vocab_size",
    }


def test_a_training_with_another_setting_keeps_the_curve_of_the_one_before(opened):
    view = opened()
    choose(view, **SMALL)
    train_to_the_end(view)
    choose(view, norm="none")
    train_to_the_end(view)
    key = view.page.locator(".chart-key").first.inner_text()
    assert re.search(r"Norms layernorm, [\d.]+ at the end", key)
    choose_text(view, "Damian's sentences")
    view.page.click("text=Start over")
    view.page.wait_for_selector("text=/Step 0\\./")
    assert "Norms" not in view.page.locator(".chart-key").first.inner_text()


def test_a_typed_text_is_read_anew_by_a_model_with_another_alphabet(opened):
    view = opened()
    view.page.fill("#text", "a wall")
    view.page.evaluate(MORE)
    choose_text(view, "Sonnets by Shakespeare")
    view.page.click("text=Start over")
    view.page.wait_for_selector("text=Guessing among 59 tokens")
    sonnets = page_data.playground_data()["texts"]["Sonnets by Shakespeare"]
    ids = [sorted(set(sonnets)).index(letter) for letter in "a wall"]
    assert view.state()["ids"] == ids
    view.page.fill("#text", "All")
    shown = view.page.locator("#tokens button").first
    choose_text(view, "The rhyme, ten times")
    view.page.click("text=Start over")
    view.page.wait_for_selector("text=Guessing among 29 tokens")
    assert view.state()["text"] == "All" and shown.inner_text() == "A"
    view.page.get_by_label(TEXT).fill("tick tock " * 9)  # which has no “A”
    view.page.click("text=Start over")
    view.page.wait_for_selector("text=Guessing among 6 tokens")
    assert view.state()["text"] == "tick tock ti"


def test_a_training_is_not_left_without_asking(opened):
    view, asked = opened(), []
    view.page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    view.page.reload()
    view.page.wait_for_selector("#page[aria-busy=false] #bars button")
    view.page.evaluate(MORE)
    view.page.click("text=One step")
    view.page.wait_for_selector("text=/Step 1: /")
    assert asked == []
    view.page.reload()
    assert asked == ["beforeunload"]


def test_an_idea_trains_with_and_without_it_one_after_the_other_on_a_text_with_validation(opened, playground):
    shorter = playground.with_name("shorter.html")
    shorter.write_text(playground.read_text().replace("max_iters: 300", "max_iters: 100"))
    view = opened(shorter)
    choose(view, n_layer=8)  # an idea is tried with the first settings
    view.page.get_by_label("Idea", exact=True).select_option(label="the MLP")
    view.page.click("text=Try it")
    view.page.wait_for_selector(".status >> text=/Model 1 of 2/")
    view.page.wait_for_selector(".chart-key >> text=MLP none", timeout=60_000)
    view.page.wait_for_selector("text=/Step [1-9]/")
    view.page.get_by_role("button", name="Pause").click()
    view.page.wait_for_selector("button:text-is('Train')")
    assert step_of(view) < 100
    knobs = [view.page.locator(f"[data-knob={name}] select") for name in ("mlp", "n_layer")]
    chosen = "(it) => it.selectedOptions[0].text"
    assert [knob.evaluate(chosen) for knob in knobs] == ["plain", "8"]  # as before
    assert view.page.get_by_label(TEXT).input_value().startswith("From fairest")


def test_without_the_mask_the_loss_is_called_a_lie_and_nothing_can_be_saved(opened):
    view = opened()
    choose(view, **SMALL | {"max_iters": 10000, "mask": "none", "learning_rate": 0.01})
    view.page.get_by_role("button", name="Train", exact=True).click()
    view.page.wait_for_selector("text=This loss is a lie", timeout=60_000)
    view.page.get_by_role("button", name="playground.pt").click()  # while it trains on
    step = step_of(view)
    view.until(f"!document.querySelector('.status').textContent.startsWith('Step {step}:')")
    assert "model.py always has the mask" in said(view)


def test_a_learning_rate_of_10_is_said_to_have_exploded(opened):
    view = opened()
    choose(view, learning_rate=10, n_embd=16)
    view.page.get_by_role("button", name="Train", exact=True).click()
    view.page.wait_for_selector("text=/It exploded: .* lower learning rate/")


BAD_TEXTS = {
    "": "There is no text to learn from",
    " \n ": "There is no text to learn from",
    "aaaaaa": "has nothing to predict",
}


def test_a_text_that_teaches_nothing_is_answered_in_words(opened):
    view = opened()
    for text, complaint in BAD_TEXTS.items():
        view.page.get_by_label(TEXT).fill(text)
        assert complaint not in said(view)
        view.page.get_by_role("button", name="Train", exact=True).click()
        view.page.wait_for_selector(f"text={complaint}")
        assert "Reading" not in view.page.inner_text(".playing .status")


def test_any_letters_and_any_length_are_learned_character_by_character(opened):
    view = opened()
    choose(view, **SMALL)
    for text in ("ab", "שלום עולם ", "👩‍🚀🌍 ok "):
        view.page.get_by_label(TEXT).fill(text if text == "ab" else 30 * text)
        train_to_the_end(view)
        guessing = f"Guessing among {len(set(text))} tokens"
        assert guessing in view.page.inner_text(".playing .status")
        assert trained_loss(view) < 1.5


def test_a_file_of_a_megabyte_is_learned_and_one_that_is_no_text_refused(opened, tmp_path):
    view = opened()
    long, binary = tmp_path / "long.txt", tmp_path / "image.png"
    long.write_bytes(b"All the king's horses\r\n" * 50_000)
    binary.write_bytes(b"\x89PNG\0\xff")
    field = view.page.locator("input[type=file]")
    field.set_input_files(binary)
    view.page.wait_for_selector("text=image.png is not a text in UTF-8")
    field.set_input_files(long)
    view.page.wait_for_selector("text=1,100,000 characters; the first 2,000 are shown")
    choose(view, **SMALL)
    train_to_the_end(view)
    assert trained_loss(view) < 1.5


def test_a_page_that_was_frozen_while_it_trained_has_lost_nothing(opened):
    view = opened()
    choose(view, n_embd=16, n_layer=1)
    view.page.get_by_role("button", name="Train", exact=True).click()
    view.page.wait_for_selector(".samples li:nth-child(4)")
    # not all_inner_texts(), in which a line that is not yet laid out has no line break
    kept = view.page.locator(".samples li").all_text_contents()
    devtools = view.context.new_cdp_session(view.page)
    for state in ("frozen", "active"):
        devtools.send("Page.setWebLifecycleState", {"state": state})
    view.page.wait_for_selector("button:text-is('Train')", timeout=60_000)
    assert step_of(view) == 300
    now = view.page.locator(".samples li").all_text_contents()
    assert now[-len(kept) :][-1] == kept[-1] and len(now) > len(kept)


def bottom_of(view: Opened, selector: str) -> float:
    box = view.page.locator(selector).bounding_box()
    return box["y"] + box["height"]


def test_it_opens_with_a_text_one_big_button_and_four_knobs_in_words(opened):
    view = opened()
    knobs = view.page.locator("[data-knob]:visible label").all_inner_texts()
    assert knobs == ["Size", "Layers", "Heads", "Learning rate"]
    assert "numbers the model has for a character" in view.page.inner_text(".playing")
    assert view.page.get_by_label(TEXT).input_value().startswith("Humpty Dumpty sat")
    view.page.click("summary >> text=More")
    assert view.page.locator("[data-knob]:visible").count() == 15
    assert "the model, for python sample.py" in view.page.inner_text(".files")


def test_on_a_phone_what_it_writes_and_the_curve_come_into_sight_when_it_trains(browser, playground):
    view = Opened(browser, playground, viewport={"width": 390, "height": 700})
    assert bottom_of(view, ".playing .chart") > 700
    choose_and_close(view, **SMALL)
    train_to_the_end(view)
    view.page.wait_for_selector("text=And now?")
    for seen in (".playing button.main", ".samples", ".playing .chart"):
        box = view.page.locator(seen).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 700, seen
    view.context.close()


def test_on_a_wide_screen_nothing_scrolls_when_it_trains(opened):
    view = opened()
    choose(view, **SMALL)
    view.page.evaluate("scrollTo(0, 0)")
    train_to_the_end(view)
    assert view.page.evaluate("scrollY") == 0


def choose_and_close(view: Opened, **knobs) -> None:
    choose(view, **knobs)
    view.page.evaluate(MORE.replace("true", "false"))


def test_at_the_end_it_says_what_happened_and_offers_three_steps(opened):
    view = opened()
    choose(view, n_layer=1, n_embd=32, learning_rate=0.01)
    assert not view.page.is_visible("text=And now?")
    train_to_the_end(view)
    view.page.wait_for_selector("text=/now knows this text by heart.*“Humpty D”/")
    view.page.get_by_role("button", name="Take an idea away").click()
    assert view.page.evaluate("document.activeElement.matches('.playing details select')")
    view.page.get_by_role("button", name="Your own text").click()
    view.page.keyboard.type("abab")
    assert view.page.get_by_label(TEXT).input_value() == "abab"


def test_the_tour_leads_through_ones_own_model_and_can_be_left_at_any_stop(opened):
    view = opened()
    view.page.click("#tour-start")
    tour = view.page.locator("#tour")
    for stop in range(1, 8):
        view.page.wait_for_selector(f"#tour >> text=/^{stop} of 7: /")
        view.page.wait_for_selector(".toured")
        view.until("document.querySelector('.toured').getBoundingClientRect().top < innerHeight")
        assert view.page.evaluate("document.activeElement.closest('#tour') !== null")
        view.page.keyboard.press("Enter")
    view.page.wait_for_selector("#tour", state="hidden")
    view.page.click("#tour-start")
    view.page.wait_for_selector("#tour >> text=/^1 of 7: /")
    view.page.keyboard.press("Escape")
    assert not tour.is_visible() and view.page.locator(".toured").count() == 0
    choose(view, mlp="none")
    view.page.click("text=Start over")
    view.until("!document.querySelector('.part.mlp')")
    view.page.click("#tour-start")
    view.page.wait_for_selector("#tour >> text=/^1 of 6: /")


READ = """async (panel) => {
  const most = () => {
    const label = panel.querySelector(".arcs svg").getAttribute("aria-label");
    const last = document.getElementById("tokens").children.length - 1;
    const read = [...label.matchAll(/ (\\d+), ([\\d.]+) %/g)].filter(([, at]) => +at < last);
    return Math.max(0, ...read.map(([, , percent]) => +percent));
  };
  const found = [];
  for (const head of [null, ...panel.querySelectorAll(".thumb")]) {
    head?.click();
    while (head && !panel.textContent.includes(`In ${head.ariaLabel}, `)) await new Promise(requestAnimationFrame);
    found.push(most());
  }
  return found;
}"""


def test_the_tour_shows_the_head_in_which_the_last_token_reads_most_from_one_before(
    opened,
):
    view = opened()
    choose(view, **SMALL | {"n_layer": 2})
    train_to_the_end(view)
    view.page.click("#tour-start")
    for stop in (1, 2):
        view.page.wait_for_selector(f"#tour >> text=/^{stop} of 7: /")
        view.page.click("#tour .main")
    view.page.wait_for_selector("#tour >> text=/^3 of 7: /")
    view.page.wait_for_selector(".arcs.toured")
    toured, *heads = view.result(READ, view.page.query_selector("#attention"))
    assert len(heads) == 8 and toured == max(heads) > min(heads)
    assert view.page.inner_text("#sections [aria-current=true]") == "5 Attention"


def test_a_token_that_is_written_lights_its_way_up_unless_nothing_should_move(browser, playground):
    lit = "document.getAnimations().map(({ effect }) => effect.getComputedTiming().endTime)"
    for motion in ("no-preference", "reduce"):
        view = Opened(browser, playground, reduced_motion=motion)
        view.page.click("#write-one")
        view.settle()
        if motion == "reduce":
            assert view.page.evaluate(lit) == []
        else:
            view.until("document.getAnimations().length > 6")
            assert max(view.page.evaluate(lit)) < 2000
        view.context.close()


def test_the_picture_changes_while_it_trains(opened):
    view = opened()
    choose(view, n_embd=16, n_layer=1)
    view.page.click("text=Start over")
    view.until("document.getElementById('about').textContent.includes('width 16')")
    view.settle()
    seen = "[...document.querySelectorAll('#flow canvas')].map((it) => it.toDataURL()).join()"
    seen = f"{seen} + document.getElementById('bars').textContent"
    view.page.evaluate(f"window.before = {seen}")
    view.page.get_by_role("button", name="Train", exact=True).click()
    view.until(f"{seen} !== before")
    assert view.page.is_visible("button:text-is('Pause')")


def test_a_link_carries_the_knobs_and_a_short_text(opened, playground):
    view = opened()
    choose(view, n_embd=32, learning_rate=0.01, position="alibi")
    view.page.get_by_label(TEXT).fill("one two, one two")
    view.until("location.hash.includes('learns=one')")
    link = view.page.url.partition("#")[2]
    other = Opened(view.context.browser, playground, f"#{link}")
    assert other.page.get_by_label(TEXT).input_value() == "one two, one two"
    for name, value in {
        "n_embd": "32",
        "learning_rate": "0.01",
        "position": "alibi",
    }.items():
        chosen = f"document.querySelector('[data-knob={name}] select').selectedOptions[0].text"
        assert other.page.evaluate(chosen) == value
    assert other.page.is_visible("[data-knob=position]")  # in sight, as it differs
    assert other.page.inner_text("#about").startswith("GPT: 2 layers × 4 heads, width 32")
    other.context.close()
    view.page.get_by_label(TEXT).fill("long " * 1000)
    view.until("!location.hash.includes('learns=')")
    assert "knobs, but not so long a text" in view.page.inner_text(".playing")
    odd = Opened(view.context.browser, playground, "#n_embd=33&learning_rate=x&learns=")
    assert "width 64" in odd.page.inner_text("#about")
    odd.context.close()


def test_no_text_is_cut_within_a_character_and_what_is_invisible_is_shown_in_bytes(opened):
    view = opened()
    view.page.get_by_label(TEXT).fill("elevenchars👩 and more\u200d of it👩")
    view.page.evaluate(MORE)
    view.page.click("text=Start over")
    view.page.wait_for_selector("text=/Step 0\\./")
    view.settle()
    assert view.state()["complaint"] == ""
    view.page.fill("#text", "more\u200d")
    assert view.state()["complaint"] == ""
    assert view.page.locator("#tokens button").last.inner_text() == "xE2 x80 x8D"


AVERAGED = """async () => {
  let clock = 0;
  performance.now = () => clock;
  const state = { first: 0, trainer: { steps: 0 }, kept: [], due: 2, losses: [], taken: 0, spent: 0, failed: false };
  const run = Object.assign(Object.create(Run.prototype), state);
  run.advance = () => { clock += 10; run.trainer.steps++; run.taken++; };
  run.keep = () => { clock += 100; run.due = Infinity; };
  await TOPICS.train({ run, post() {} }, { until: 4 }, () => true);
  return run.news().ms;
}"""


def test_the_time_of_a_step_is_an_average_with_evaluations_and_samples(opened):
    assert opened().page.evaluate(AVERAGED) == (4 * 10 + 2 * 100) / 4


def test_in_print_no_line_of_the_toy_crosses_its_text_and_nothing_is_clipped(opened):
    view = opened()
    choose(view, **SMALL)
    train_to_the_end(view)
    view.page.emulate_media(media="print")
    assert not view.page.is_visible(".network svg")
    clipped = "(it) => it.scrollHeight > it.clientHeight + 1"
    for part in (".samples", ".playing textarea"):
        assert not view.page.locator(part).evaluate(clipped), part


def test_runs_are_drawn_in_colours_of_their_own_and_only_guessing_is_dashed(opened):
    view = opened()
    choose(view, **SMALL)
    for norm in ("layernorm", "none", "rmsnorm"):
        choose(view, norm=norm)
        train_to_the_end(view)
    look = "(all) => all.map((it) => getComputedStyle(it)).map((x) => [x.stroke, x.strokeDasharray])"
    guessing, *runs = view.page.locator(".playing .chart path:not(.axes)").evaluate_all(look)
    colours = {colour for colour, dashes in runs if dashes == "none"}
    assert len(runs) == len(colours) == 4 and guessing[1] != "none"
