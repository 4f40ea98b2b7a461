"""python -m benchmarks --what=page: how long a page of explain.py takes to answer a keystroke in a browser.

For a playground, it measures the time from opening it until its GPT recites the rhyme.
"""

import math
import random
import shutil
import statistics
from pathlib import Path

from benchmarks.settings import BenchConfig
from humptygpt.cli import UserError
from humptygpt.data.builtin import data_set

RHYME = data_set("humpty_dumpty").RHYME

FIRST_KEYS = 10  # uncounted keystrokes, during which the browser compiles
REST_MS = 200  # pause after a new text, while its sections are drawn
# A message that is posted before a frame is painted arrives after the paint. The page is busy until it has drawn the
# probabilities of the text.
PAINTED = """() => {
  window.painted = [];
  const page = document.getElementById("page");
  const later = new MessageChannel();
  const frame = (begin) => requestAnimationFrame(() => {
    if (page.ariaBusy === "true") return frame(begin);
    later.port1.onmessage = () => painted.push(performance.now() - begin);
    later.port2.postMessage(null);
  });
  addEventListener("keydown", ({ timeStamp }) => frame(timeStamp), true);
  const data = JSON.parse(document.getElementById("data").textContent);
  return [data.tokenizer.alphabet ?? "", data.model.block_size];
}"""
TIME_OF_NEXT = """n => new Promise((done) => {
  const ask = () => n < painted.length ? done(painted[n]) : setTimeout(ask);
  ask();
})"""
# Press keys 10 ms apart, one task each. Milliseconds from the last key until the page is at rest.
BURST = """([letters, n]) => new Promise((done) => {
  const [text, page] = ["text", "page"].map((id) => document.getElementById(id));
  let [pressed, last] = [0, 0];
  const rest = () => page.ariaBusy === "true" ? setTimeout(rest, 1) : done(performance.now() - last);
  const press = () => {
    text.value += letters[pressed % letters.length];
    last = performance.now();
    text.dispatchEvent(new Event("input"));
    setTimeout(++pressed < n ? press : rest, 10);
  };
  press();
})"""
# Characters per second that "Continue" writes, and milliseconds from "Stop" until it is painted or until the text no
# longer changes, whichever is later.
CONTINUED = """seconds => new Promise((done) => {
  const [text, go, page] = ["text", "go-on", "page"].map((id) => document.getElementById(id));
  const before = text.value.length;
  const begin = performance.now();
  go.click();
  setTimeout(() => {
    const rate = (text.value.length - before) / (performance.now() - begin) * 1000;
    const stopped = performance.now();
    let [written, end] = [text.value, stopped];
    go.click();
    const channel = new MessageChannel();
    channel.port1.onmessage = () => (end = performance.now());
    requestAnimationFrame(() => channel.port2.postMessage(null));
    const rest = () => {
      if (text.value !== written) [written, end] = [text.value, performance.now()];
      if (page.ariaBusy === "true") setTimeout(rest, 1);
      else setTimeout(() => done([rate, end - stopped]), 100);
    };
    rest();
  }, seconds * 1000);
})"""

# Milliseconds of steps of training on random tokens: [texts, tokens of each]
STEPS = """([texts, T, count]) => {
  const { textContent, dataset } = document.getElementById("data");
  const data = readData(textContent, dataset.checksum);
  const trainer = new Trainer(makeModel(data), data.training);
  const [random, V] = [randomNumbers(1), data.tokenizer.pieces.lengths.length];
  const drawn = () => Array.from({ length: T }, () => Math.floor(random() * V));
  const batch = Array.from({ length: texts }, () => ({ idx: drawn(), targets: drawn() }));
  return Array.from({ length: count }, () => {
    const begin = performance.now();
    trainer.step(batch);
    return performance.now() - begin;
  });
}"""


# Milliseconds from opening the page until a sample has the rhyme, and until the training has ended.
RECITED = """rhyme => new Promise((done) => {
  const go = document.querySelector("#playground .main");
  let recited = null;
  const look = () => {
    const samples = [...document.querySelectorAll(".samples code")];
    if (samples.some(({ textContent }) => textContent.includes(rhyme))) recited ??= performance.now();
    if (go.textContent === "Train") done([recited, performance.now()]);
    else setTimeout(look, 10);
  };
  go.click();
  setTimeout(look, 1000);
})"""
# From now on, keep the milliseconds of tasks of more than 50.
LONG_TASKS = """() => {
  window.tasks = [0];
  new PerformanceObserver((list) => tasks.push(...list.getEntries().map(({ duration }) => duration)))
    .observe({ type: "longtask" });
}"""


def bench(config: BenchConfig) -> dict:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError("what=page needs playwright: pip install playwright") from None
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise UserError("what=page needs an installed Chromium; Debian: apt-get install chromium")
    path = Path(config.page).resolve()
    if not path.is_file():
        raise UserError(f"no {config.page}; make it with explain.py")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        if '"texts":' in path.read_text():
            return time_training(browser, path)
        return time_page(browser, path, config.keystrokes)


def time_training(browser, path: Path) -> dict[str, dict]:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(path.as_uri())
    page.wait_for_selector("#page[aria-busy=false] #bars button")
    opened = page.evaluate("performance.now()")
    page.evaluate(LONG_TASKS)
    recited, trained = page.evaluate(RECITED, RHYME.strip())
    longest = page.evaluate("Math.max(...tasks)")
    times = {"opened": opened, "recited": recited, "trained": trained}
    found = {name: {"ms": time and round(time)} for name, time in times.items()}
    return found | {"longest_task_in_training": {"ms": round(longest)}}


def time_page(browser, path: Path, keystrokes: int) -> dict[str, dict]:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(f"{path.as_uri()}#section=attention")
    page.wait_for_selector("#page[aria-busy=false] #bars button")
    page.evaluate(LONG_TASKS)
    alphabet, block_size = page.evaluate(PAINTED)
    letters = [letter for letter in alphabet if "a" <= letter <= "z"]
    if not letters:
        raise UserError(f"{path}: its tokens are not characters, which this benchmark types")
    # beyond a full context, the page continues from the newest half
    lengths = {"64": 64, "full": block_size, "beyond": block_size + 1}
    figures = {
        f"{where}_{name}": time_keystrokes(page, letters, T, where, keystrokes)
        for name, T in lengths.items()
        for where in ("appended", "anywhere")
    }
    page.fill("#text", "".join(letters[:1] * (block_size // 2)))
    figures["burst"] = {"ms": round(page.evaluate(BURST, [letters, 2 * keystrokes]), 1)}
    rate, stopped = page.evaluate(CONTINUED, keystrokes / 10)
    figures["continued"] = {"tokens_per_s": round(rate, 1), "stop_ms": round(stopped, 1)}
    figures["longest_task"] = {"ms": round(max(page.evaluate("tasks")), 1)}
    T = min(block_size, 256)
    for texts in (1, 4):
        times = page.evaluate(STEPS, [texts, T, 11])[2:]
        figures[f"step_{texts}x{T}"] = {"ms": round(statistics.median(times), 1)}
    return figures


def time_keystrokes(page, letters: list[str], T: int, where: str, count: int) -> dict[str, float]:
    """Milliseconds per keystroke. T: length of the text in tokens after a keystroke. where: appended or anywhere."""
    draw = random.Random(1)
    times = []
    for _ in range(FIRST_KEYS + count):
        page.fill("#text", "".join(draw.choices(letters, k=T - 1)))
        page.wait_for_selector("#page[aria-busy=false]")
        page.wait_for_timeout(REST_MS)
        position = T - 1 if where == "appended" else draw.randrange(T - 1)
        page.eval_on_selector(
            "#text",
            "(text, at) => { text.focus(); text.setSelectionRange(at, at); }",
            position,
        )
        painted = page.evaluate("painted.length")
        page.keyboard.press(draw.choice(letters))
        times.append(page.evaluate(TIME_OF_NEXT, painted))
    times = sorted(times[FIRST_KEYS:])
    return {
        "median_ms": round(statistics.median(times), 1),
        "p95_ms": round(times[math.ceil(0.95 * count) - 1], 1),
    }
