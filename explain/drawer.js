/* The drawer: how the selected number was computed. */
const LARGEST = 8; // terms that are spelled out
const LEAST_SEEN = 240; // pixels of the drawer that are in sight when it opens
const TRAINED = ": weights. They were learned in training and computed from nothing: a chain ends here.";
const ROUNDED = " The page has the weights in 16 bits: a checkpoint's number can differ in the fourth decimal.";
const DIGITS = " The page rounds what it shows, so a sum can differ in its last digit.";
const rounded = (app) => (app.playground.config ? DIGITS : ROUNDED); // weights that it trained itself are not rounded

/** The section that shows the numbers of a path: the first that matches. */
const PLACES = [
  [/^gradient/, "step"],
  [/^source/, "transformer"],
  [/(attn|cross|mlp)_norm/, "norm"],
  [/cross/, "transformer"],
  [/^(logits|probs)/, "softmax"],
  [/^(window|layers)/, "writing"],
  [/^wte/, "embeddings"],
  [/position/, "positions"],
  [/feed_forward/, "mlp"],
  [/\.attn\./, "attention"],
  [/blocks|embed/, "residual"],
  [/./, "gpt"],
];

/** The arithmetic of the selected number, term by term. Each operand leads to its own arithmetic. */
class Drawer {
  constructor(app) {
    this.app = app;
    this.body = element("arithmetic");
    this.was = null;
    addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.app.at?.number) this.close();
    });
  }

  /** Scroll until the drawer is in sight, or the selected cell no longer under it. */
  async reveal() {
    await frames(2); // until the strips are painted
    const { top, width } = element("drawer").getBoundingClientRect();
    if (!width) return;
    const selected = [...strips].find((strip) => strip.options.part === opened && strip.selected >= 0 && strip.size);
    const covers = getComputedStyle(element("drawer")).position === "fixed";
    const covered = selected ? selected.selectedBottom() + 12 - top : 0;
    const hidden = covers ? covered : top + LEAST_SEEN - innerHeight;
    if (hidden > 0) scrollBy({ top: hidden, behavior: "instant" });
  }

  /** Move the focus into the drawer. */
  enter() {
    this.body.querySelector("button:enabled")?.focus({ preventScroll: true });
    this.reveal();
  }

  update() {
    const { app } = this;
    const { number } = app.at;
    const from = document.activeElement.closest("#panels *") ?? this.opener;
    if (element("drawer").hidden === Boolean(number)) app.hold(from);
    element("drawer").hidden = !number;
    opened = number ? app.resolvePath(parseAddress(number).path) : null;
    lightDependencies(null);
    const focused = this.body.contains(document.activeElement);
    if (!number) {
      this.body.replaceChildren();
      if (focused) this.leave();
      return;
    }
    const y = explainNumber(app.model, app.trace, number);
    if (document.activeElement !== document.body && !focused) this.opener = document.activeElement;
    const { trail } = app.state;
    const same = number === this.was;
    const wasOpen = same && this.body.querySelector("details[open]");
    this.was = number;
    const back = button("Back", () => app.open(trail.at(-1), trail.slice(0, -1)), { disabled: !trail.length });
    const close = button("Close", () => this.close());
    const head = h("div", { class: "drawer-head" }, h("h3", {}, this.title(y)), h("span", {}, back, close));
    const shownValue = h("p", { class: "value", "data-value": y.value }, digits(y.value));
    const place = this.place(parseAddress(y.address).path);
    const value = h("div", { class: "drawer-head" }, shownValue, h("span", {}, place));
    const rows = h("table", { class: "terms" }, h("tbody", {}, this.chosenTerms(y)));
    const formula = note(`${y.formula}. Press Enter again to move in here, Escape to go back.`);
    const trained = operandsOf(y).some(({ weight }) => weight);
    const ends = trained && [h("b", { class: "weight" }, "Numbers in this colour"), TRAINED, " "];
    const parts = [head, value, formula, rows, y.why && note(y.why), this.all(y, wasOpen)];
    parts.push(note(ends || null, rounded(app)));
    const draw = () => this.body.replaceChildren(...parts.filter(Boolean));
    if (same) return keepFocus(this.body, draw);
    draw();
    if (focused) this.enter();
  }

  /** A button that leads to the section of a path. */
  place(path) {
    const [, id] = PLACES.find(([pattern]) => pattern.test(path));
    const panel = this.app.panels.find((each) => each.id === id);
    const [number, ...name] = panel.chip.textContent.split(" ");
    return button(`Show in section ${number} (${name.join(" ")})`, () => this.show(panel));
  }

  /** Go to a section, to the strip of numbers that the selected number is in, if there is one. */
  async show(panel) {
    const { number, trail } = this.app.state;
    this.app.goTo(panel.id, { ...changesTo(number), trail });
    await frames(3); // until it is painted
    const shows = ({ options, root, selected }) =>
      options.part === opened && selected >= 0 && panel.root.contains(root) && !root.hidden;
    const strip = [...strips].find(shows);
    if (!strip) return;
    strip.root.scrollIntoView({ block: "nearest", behavior: "instant" });
    strip.canvas.focus({ preventScroll: true });
    this.reveal();
  }

  title(y) {
    const { path, at } = parseAddress(y.address);
    const { tokenizer, trace } = this.app;
    if (path.startsWith("gradient.")) return y.title;
    if (path === "logits" || path === "probs") return `${y.title}: “${shown(tokenizer, at[1])}”`;
    const source = path.startsWith("source") || path.includes(".context.");
    const name = (t, ofSource) => `“${shown(tokenizer, (ofSource ? trace.source.idx : trace.idx)[t])}”`;
    if (at.length < 3) return `${y.title} (${name(at[0], source)})`;
    return `${y.title} (${name(at[1], source)} to ${name(at[2], source || path.includes("cross_attn"))})`;
  }

  /** Rows: the largest terms, the sum of the others, the bias, the sum, and what is done with it. */
  chosenTerms(y) {
    const bias = y.terms.filter(({ name }) => name === "bias");
    const sorted = y.terms.filter(({ name }) => name !== "bias").sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    const [most, others] = [sorted.slice(0, LARGEST), sorted.slice(LARGEST)];
    const rows = most.map((term) => this.row(term));
    if (others.length) rows.push(this.line(`the other ${others.length}`, addUp(others)));
    rows.push(...bias.map((term) => this.row(term)));
    if (y.terms.length > 1) rows.push(this.line("sum", y.sum, { kind: "sum" }));
    const step = ({ text, value, operand }) =>
      this.line(text, value, { spelled: operand && this.operand(operand), kind: "sum" });
    return [...rows, ...y.steps.map(step)];
  }

  row({ name, parts, value }) {
    const spelled = parts.map((part) => (typeof part === "string" ? part : this.operand(part)));
    return this.line(this.named(name), value, { spelled });
  }

  named(name) {
    const [, kind, i] = name.match(/^(key|token) (\d+)$/) ?? [];
    if (!kind) return name;
    const { trace, tokenizer, at } = this.app;
    const path = parseAddress(at.number).path;
    if (/logits|probs/.test(path)) return `“${shown(tokenizer, +i)}”`;
    if (kind === "token" && !path.startsWith("gradient.")) return name;
    const keys = path.startsWith("source") || path.includes("cross_attn") ? trace.source.idx : trace.idx;
    return `${name} “${shown(tokenizer, keys[+i])}”`;
  }

  operand({ value, address, name, weight }) {
    const text = digits(value);
    if (weight) return h("b", { class: "weight", title: name }, text);
    if (!address) return h("span", { title: name }, text);
    return button(text, () => this.walk(address), {
      class: "operand",
      "data-address": address,
      title: name ?? titleOf(...Object.values(parseAddress(address)), this.app.config),
    });
  }

  /** A row: a name, what it is spelled out as, and its value. kind: sum, unless it is one of the terms. */
  line(name, value, { spelled = null, kind = null } = {}) {
    const head = h("th", { scope: "row", colspan: spelled ? 1 : 2 }, name);
    const attributes = { class: kind, "data-term": kind ? null : value };
    return h("tr", attributes, head, spelled && h("td", {}, spelled), h("td", { class: "number" }, digits(value)));
  }

  close() {
    this.app.change({ number: null, trail: [] }, { push: true });
    this.leave();
  }

  /** Return the focus to the place where the number was selected. */
  leave() {
    (this.opener?.isConnected ? this.opener : element("text")).focus({ preventScroll: true });
  }

  walk(address) {
    const { number, trail } = this.app.state;
    this.app.open(address, [...trail, number].slice(-TRAIL));
  }

  /** All terms, spelled out on request. */
  all(y, wasOpen) {
    if (y.terms.length <= LARGEST) return null;
    const details = h("details", { open: Boolean(wasOpen) }, h("summary", {}, `All ${y.terms.length} terms`));
    const spell = () => {
      if (!details.open || details.querySelector("table")) return;
      const body = h("tbody", {}, y.terms.map((term) => this.row(term)));
      details.append(scrolling("all terms", h("table", { class: "terms" }, body)));
    };
    details.addEventListener("toggle", spell);
    return details;
  }
}

function signed(x) {
  return `${x < 0 ? "" : "+"}${digits(x)}`;
}
