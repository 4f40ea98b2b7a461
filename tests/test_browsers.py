"""The playground in Firefox and in WebKit, which stands for Safari: see tests/browsers.py."""

import pytest
from browsers import Browser, Firefox, WebKit, start_browser

import explain

pytestmark = pytest.mark.page
ARROW_LEFT, ARROW_RIGHT = "\ue012", "\ue014"
KNOBS = "#n_layer=1&n_embd=32&learning_rate=0.01"
UNTIL = """const until = async (done, seconds = 30) => {
  for (const end = Date.now() + 1000 * seconds; !done(); await new Promise((next) => setTimeout(next, 20)))
    if (Date.now() > end) throw new Error(`not in ${seconds} s: ${done}\n${document.body.innerText}`);
};
const element = (id) => document.getElementById(id);
const calm = () => until(() => element("page").ariaBusy === "false" && element("bars").children.length);
"""


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    path = tmp_path_factory.mktemp("playground") / "playground.html"
    explain.main([f"--playground={path}"])
    return path


@pytest.fixture(scope="module", params=[Firefox, WebKit])
def started(request, tmp_path_factory):
    """Returns a browser, another one if the last one has died."""
    browsers = []

    def started() -> Browser:
        if not browsers or browsers[-1].has_died:
            folder = tmp_path_factory.mktemp("profile")
            browsers.append(start_browser(request.param, folder))
        return browsers[-1]

    yield started
    for browser in browsers:
        browser.close()


@pytest.fixture
def opened(started, playground):
    """Opens the playground; afterwards no script must have failed."""

    browser = started()

    def open_page(hash: str = ""):
        browser.open("about:blank")
        browser.open(f"file://{playground}{hash}")
        browser.run(
            f"""const {{ dataset }} = document.documentElement;
            dataset.failures = "";
            for (const kind of ["error", "unhandledrejection"])
              addEventListener(kind, ({{ message, reason }}) => (dataset.failures += `${{message ?? reason}} `));
            {UNTIL} await calm();"""
        )
        return browser

    yield open_page
    assert browser.run("return document.documentElement.dataset.failures") == ""


def test_the_rhyme_is_recited_after_a_training(opened):
    page = opened(KNOBS)
    said = page.run(
        f"""{UNTIL}
        const press = (name) => [...document.querySelectorAll("button")].find((it) => it.textContent === name).click();
        press("Train");
        await until(() => element("playground").textContent.includes("by heart. Type its beginning"), 100);
        await calm();
        element("text").value = "Humpty D";
        element("text").dispatchEvent(new Event("input", {{ bubbles: true }}));
        await calm();
        element("greedy").click();
        press("Continue");
        await until(() => element("text").value.length > 25);
        press("Stop");
        return element("text").value;"""
    )
    assert said.startswith("Humpty Dumpty had a great") or said.startswith("Humpty Dumpty sat on a")


def test_the_drawer_follows_a_held_arrow_key_and_the_address_its_last_number(opened):
    page = opened("#section=embeddings")
    page.run("document.querySelector('#embeddings .strip canvas').focus()")
    # 180 numbers are opened, and Safari refuses more than 100 addresses in 10 s
    for key in (ARROW_RIGHT, ARROW_LEFT, ARROW_RIGHT):
        for _ in range(3):
            page.press(*[key] * 20)
    number = page.run(
        f"""{UNTIL}
        await calm();
        const shown = () => document.querySelector("#embeddings .strip canvas").getAttribute("aria-valuenow");
        await until(() => location.hash.includes(`number=wte%3A11%2C${{shown()}}`));
        return [shown(), element("arithmetic").querySelector("h3").textContent];"""
    )
    assert number[0] == "60" and "60" in number[1]


def test_a_text_of_two_megabytes_is_read_and_never_becomes_an_address(opened):
    page = opened()
    chosen = page.run(
        f"""{UNTIL}
        element("text").value = "Humpty ".repeat(300000);
        element("text").dispatchEvent(new Event("input", {{ bubbles: true }}));
        await until(() => element("tokens").children.length > 30);
        await calm();
        await new Promise((next) => setTimeout(next, 400));
        element("tokens").children[3].click();
        await calm();
        await new Promise((next) => setTimeout(next, 400));
        return [element("tokens").children[3].ariaPressed, location.hash.length < 100000];"""
    )
    assert chosen == ["true", True]
