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
    view.page.get_by_role("button", name="Train", exact=True).evaluate(TO_THE_END)
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
def test_it_learns_the_rhyme_and_sample_py_recites_it_from_the_saved_file(
    opened, capsys, knobs
):
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
    choose_text(view, "The rhyme")
    view.page.click("text=Start over")
    view.page.wait_for_selector("text=Guessing among 29 tokens")
    assert view.state()["text"] == "All" and shown.inner_text() == "A"


def test_a_training_is_not_left_without_asking(opened):
    view, asked = opened(), []
    view.page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    view.page.reload()
    view.page.evaluate(MORE)
    view.page.click("text=One step")
    view.page.wait_for_selector("text=/Step 1: /")
    assert asked == []
    view.page.reload()
    assert asked == ["beforeunload"]


def test_an_idea_trains_with_and_without_it_one_after_the_other_on_a_text_with_validation(
    opened, playground
):
    shorter = playground.with_name("shorter.html")
    shorter.write_text(playground.read_text().replace("max_iters: 300", "max_iters: 100"))
    view = opened(shorter)
    choose(view, n_layer=8)  # an idea is tried with the first settings
    view.page.get_by_label("Without", exact=True).select_option(label="the MLP")
    view.page.click("text=Try it")
    view.page.wait_for_selector(".status >> text=/Model 1 of 2/")
    view.page.wait_for_selector(".chart-key >> text=MLP none", timeout=60_000)
    view.page.wait_for_selector("text=/Step [1-9]/")
    view.page.get_by_role("button", name="Pause").click()
    view.page.wait_for_selector("button:text-is('Train')")
    assert step_of(view) < 100
    knob = "[data-knob={}] select"
    assert view.page.locator(knob.format("mlp")).input_value() == "0"
    assert view.page.locator(knob.format("n_layer")).input_value() == "1"
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
