"use strict";

/* The page: the text and the next token, the map of the model, the arithmetic, and one selection for all of them. */

const SHOWN = 8; // bars
const element = (id) => document.getElementById(id);

function main() {
  try {
    const data = readData(element("data").textContent, element("data").dataset.checksum);
    new App(data, makeModel(data), makeTokenizer(data.tokenizer)).start();
  } catch (error) {
    report(`The data of this page is damaged: ${error.message}. Make the page again with explain.py.`);
  }
}

function report(problem) {
  element("problem").textContent = problem;
  element("problem").hidden = !problem;
}

/** at, the selection: token t, key, layer, head, vocabulary (id of a next token), address (of a number), section. */
class App {
  constructor(data, model, tokenizer) {
    Object.assign(this, { data, model, tokenizer, config: model.config });
    this.translates = data.task === "translation";
    this.encodes = model.config.model === "transformer";
    this.stack = { window_mlp: null, gpt: "stack", transformer: "decoder" }[model.config.model];
    this.at = { t: -1, key: 0, layer: 0, head: 0, vocabulary: -1, address: null, section: PANELS[0].id };
    this.sampling = { temperature: 1, top_k: 0, top_p: 1, min_p: 0 };
    this.trace = this.written = null;
    this.panels = [];
  }

  start() {
    const { data } = this;
    element("name").textContent = data.name;
    document.title = `HumptyGPT: ${data.name}`;
    element("about").textContent = describeRun(data);
    element("source-part").hidden = !this.translates;
    element("text-label").textContent = this.translates ? "Translation so far" : "Text";
    element(this.translates ? "source" : "text").value = data.start;
    element("page").hidden = false;
    for (const id of ["text", "source"]) element(id).addEventListener("input", () => this.typed());
    element("legend").replaceWith(legend());
    this.map = new PipelineMap(this);
    this.drawer = new Drawer(this);
    this.buildPanels();
    dependenciesOf = (part) => this.operandsOf(part);
    addEventListener("hashchange", (event) => this.restore(new URL(event.newURL).hash));
    this.refresh();
    this.restore(location.hash);
    for (const id of ["text", "source"]) element(id).scrollTop = element(id).scrollHeight; // of a phone's single line
  }

  // ----------------------------------------------------------------------------------
  // Text -> trace

  typed() {
    this.at.t = this.at.vocabulary = -1;
    this.refresh();
  }

  refresh() {
    try {
      const begin = performance.now();
      const [text, source] = [element("text").value, element("source").value];
      const written = this.written?.text === text ? this.written.ids : null; // a text can have other ids, too
      const read = this.translates ? readPair(this, source, written ? "" : text) : readText(this, written ? "" : text);
      if (written && this.translates) read.idx = [...read.idx, ...written].slice(0, this.config.block_size);
      else if (written) read.idx = written.slice(-this.config.block_size);
      this.source = read.source;
      this.trace = forward(this.model, read.idx, { source: read.source, before: this.trace, lastOnly: true });
      report("");
      this.clamp();
      this.render();
      const ms = (performance.now() - begin).toFixed(0);
      element("took").textContent = `${read.idx.length} tokens, ${read.idx.length - this.trace.first} new: ${ms} ms`;
    } catch (error) {
      for (const id of ["tokens", "bars"]) element(id).replaceChildren(); // those of another text
      report(error.message);
    }
  }

  /** The selection, within what this text and this model have. */
  clamp() {
    const { at, config } = this;
    const last = this.trace.idx.length - 1;
    at.t = at.t < 0 || at.t > last ? last : at.t;
    const keys = this.encodes ? Math.max(this.source.length, last + 1) : last + 1;
    at.key = Math.min(Math.max(at.key, 0), keys - 1);
    at.layer = Math.min(Math.max(at.layer, 0), config.n_layer - 1);
    at.head = Math.min(Math.max(at.head, 0), config.n_head - 1);
    this.ensureLogits(at.t);
    if (!(at.vocabulary >= 0 && at.vocabulary < this.model.tokenizer_vocab_size)) {
      at.vocabulary = likeliest(this.probs(), 1)[0];
    }
    if (at.address && valueAt(this.trace, at.address) === undefined) at.address = null;
  }

  ensureLogits(t) {
    const { trace } = this;
    if (trace.logits[t]) return;
    trace.logits[t] = head(this.model, [trace.output[t]])[0];
    trace.probs[t] = probabilities(this.model, trace.logits[t]);
  }

  logits() {
    return this.trace.logits[this.at.t];
  }

  probs() {
    return this.trace.probs[this.at.t];
  }

  // ----------------------------------------------------------------------------------
  // The selection

  select(changes) {
    if ("t" in changes && !("vocabulary" in changes)) this.at.vocabulary = -1;
    Object.assign(this.at, changes);
    this.clamp();
    this.render();
  }

  /** Spell out the number at this address. Where it is about another token or head, that becomes the selected one. */
  open(address) {
    const { path, at } = parseAddress(address);
    const changes = { address };
    const layer = path.match(/(?:blocks|layers)\.(\d+)/);
    if (layer) changes.layer = +layer[1];
    const ofSource = path.startsWith("source") || path.includes(".context.");
    if (at.length === 3) Object.assign(changes, { head: at[0], key: at[2] });
    if (!ofSource) changes.t = at.at(-2);
    else if (at.length === 2) changes.key = at[0];
    if (path === "logits" || path === "probs") changes.vocabulary = at[1];
    if (changes.t === this.at.t) delete changes.t;
    if ("t" in changes && path !== "logits" && path !== "probs") this.at.vocabulary = -1;
    if ("t" in changes) this.ensureLogits(changes.t);
    this.select(changes);
    this.drawer.reveal();
  }

  /** The first name of a path. */
  resolve(path) {
    for (let next; (next = aliasOf(this.model, this.trace, path));) path = next;
    return path;
  }

  /** Which of a row's numbers is the selected one; -1: none. */
  selectedIn(path, ...before) {
    if (!this.at.address) return -1;
    const { path: selected, at } = parseAddress(this.at.address);
    if (this.resolve(selected) !== this.resolve(path)) return -1;
    return before.every((index, i) => index === at[i]) ? at.at(-1) : -1;
  }

  /** Paths of the numbers that those of a part are computed from. */
  operandsOf(part) {
    const sizes = /\.(scores|weights)$/.test(part) ? [this.at.head, this.at.t, 0] : [this.at.t, 0];
    try {
      const { terms } = explainNumber(this.model, this.trace, `${part}:${sizes}`);
      const factors = terms.flatMap((term) => term.factors).filter(({ address }) => address);
      return [...new Set(factors.map(({ address }) => this.resolve(parseAddress(address).path)))];
    } catch {
      return []; // a part of another text, until its strip is drawn again
    }
  }

  // ----------------------------------------------------------------------------------
  // The hash

  keep() {
    clearTimeout(this.keeping);
    this.keeping = setTimeout(() => {
      const { t, key, layer, head, vocabulary, address, section } = this.at;
      const query = new URLSearchParams({ section, t, key, layer, head, next: vocabulary });
      if (address) query.set("number", address);
      const typed = { text: element("text").value, source: element("source").value };
      const start = { [this.translates ? "source" : "text"]: this.data.start };
      for (const id of ["text", "source"]) if (typed[id] !== (start[id] ?? "")) query.set(id, typed[id]);
      this.hash = `#${query}`;
      history.replaceState(null, "", this.hash);
    }, 150);
  }

  /** hash: of the event, since keep() may have replaced the address meanwhile. */
  restore(hash) {
    if (hash === this.hash || hash.length < 2) return;
    clearTimeout(this.keeping);
    const query = new URLSearchParams(hash.slice(1));
    if (!query.has("section")) return;
    const texts = ["text", "source"].filter((id) => query.has(id));
    for (const id of texts) element(id).value = query.get(id);
    const number = (name) => parseInt(query.get(name) ?? "-1", 10);
    this.at = {
      t: number("t"),
      key: number("key"),
      layer: number("layer"),
      head: number("head"),
      vocabulary: number("next"),
      address: query.get("number"),
      section: query.get("section"),
    };
    if (this.at.t >= 0 && this.at.t < this.trace.idx.length) this.ensureLogits(this.at.t);
    const { address } = this.at;
    this.refresh();
    if (address && address === this.at.address) this.open(address);
    this.goTo(this.at.section);
  }

  // ----------------------------------------------------------------------------------
  // Drawing

  buildPanels() {
    const nav = element("sections");
    PANELS.forEach((panel, i) => {
      const title = h(
        "h2",
        { id: `title-${panel.id}`, tabindex: -1 },
        h("span", { class: "count" }, i + 1),
        panel.title,
      );
      const body = h("div", { class: "panel-body" });
      const root = h("section", { id: panel.id, "aria-labelledby": `title-${panel.id}` }, title, body);
      element("panels").append(root);
      const chip = button(h("span", { class: "chip-number" }, i + 1), () => this.goTo(panel.id), {
        title: panel.title,
        "aria-label": `${i + 1}: ${panel.title}`,
      });
      nav.append(chip);
      this.panels.push({ ...panel, root, body, chip, built: null, visible: i === 0, dirty: true });
    });
    const watch = new IntersectionObserver((entries) => this.scrolled(entries), { rootMargin: "150px 0px" });
    for (const { root } of this.panels) watch.observe(root);
    addEventListener("scroll", () => this.findSection(), { passive: true });
  }

  scrolled(entries) {
    for (const entry of entries) {
      const panel = this.panels.find(({ root }) => root === entry.target);
      panel.visible = entry.isIntersecting;
      if (panel.visible && panel.dirty && this.trace) this.renderPanel(panel);
    }
  }

  findSection() {
    if (performance.now() < (this.jumping ?? 0)) return;
    const top = element("sections").getBoundingClientRect().bottom + 40;
    const found = this.panels.findLast(({ root }) => root.getBoundingClientRect().top <= top) ?? this.panels[0];
    if (found.id !== this.at.section) this.setSection(found.id);
  }

  setSection(id) {
    this.at.section = id;
    for (const panel of this.panels) panel.chip.setAttribute("aria-current", panel.id === id ? "true" : "false");
    element("section-title").textContent = this.panels.find((panel) => panel.id === id).title;
    this.keep();
  }

  goTo(id) {
    const panel = this.panels.find((other) => other.id === id) ?? this.panels[0];
    this.jumping = performance.now() + 300;
    for (const other of this.panels) if (!other.built) this.renderPanel(other); // so that nothing above it grows later
    this.setSection(panel.id);
    panel.root.querySelector("h2").focus({ preventScroll: true });
    const first = panel === this.panels[0];
    const scroll = () => (first ? scrollTo(0, 0) : panel.root.scrollIntoView({ block: "start" }));
    scroll();
    requestAnimationFrame(() => requestAnimationFrame(scroll)); // strips above it have their heights by then
  }

  renderPanel(panel) {
    if (!panel.built) {
      const missing = panel.missing?.(this);
      panel.built = missing ? { nodes: [missingNote(missing)], update() {} } : panel.build(this);
      const chapter = panel.chapter && ` In plain Python: “${panel.chapter}” in from_scratch.py.`;
      panel.body.replaceChildren(h("p", { class: "intro" }, panel.intro, chapter), ...panel.built.nodes);
    }
    panel.dirty = false;
    panel.built.update();
  }

  render() {
    showTokens(this);
    showBars(this);
    this.map.update();
    this.drawer.update();
    for (const panel of this.panels) {
      panel.dirty = true;
      if (panel.visible) this.renderPanel(panel);
    }
    this.setSection(this.at.section);
  }

  // ----------------------------------------------------------------------------------
  // Writing

  /** The ids of the whole text, those that have left the context included; of a translation, without its source. */
  allIds() {
    const text = element("text").value;
    if (this.written?.text === text) return this.written.ids;
    return this.translates ? this.tokenizer.encode(text) : idsOf(this.tokenizer, text);
  }

  /** Append a token to the text. False where the text has ended. */
  write(id) {
    const text = element("text");
    if (id === this.tokenizer.eot) return false;
    if (this.translates && this.trace.idx.length === this.config.block_size) return false;
    const ids = [...this.allIds(), id];
    text.value = this.tokenizer.decode(ids);
    this.written = { text: text.value, ids };
    this.at.t = this.at.vocabulary = -1;
    this.refresh();
    text.scrollTop = text.scrollHeight;
    return true;
  }
}

function describeRun({ model, progress, metrics }) {
  const kind = { window_mlp: "window network", gpt: "GPT", transformer: "encoder-decoder" }[model.model];
  const parts = [
    `${kind}, ${model.n_layer} ${model.n_layer === 1 ? "layer" : "layers"}, width ${model.n_embd}`,
    `step ${progress.iter.toLocaleString("en")}`,
  ];
  parts.push(progress.best_val_loss ? `best val loss ${progress.best_val_loss.toFixed(4)}` : "no evaluation yet");
  if (!metrics.length) parts.push("no metrics.jsonl");
  return parts.join(" · ");
}

function missingNote({ text, command }) {
  return h("div", { class: "missing" }, h("p", {}, text), h("p", {}, "A run that has it: ", h("code", {}, command)));
}

/** What a token stands for, with signs for what cannot be seen. */
function shown(tokenizer, id) {
  return tokenizer.decode([id]).replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

/** The ids of the n most probable tokens, the first one first. */
function likeliest(probs, n) {
  const best = [];
  probs.forEach((p, id) => {
    if (best.length === n && p <= probs[best[n - 1]]) return; // nearly all of a large vocabulary
    best.splice(best.findLastIndex((other) => probs[other] >= p) + 1, 0, id);
    best.length = Math.min(best.length, n);
  });
  return best;
}

/** The tokens, of which one is selected; the arrow keys walk. */
function showTokens(app) {
  const { tokenizer, trace, at } = app;
  const list = element("tokens");
  while (list.children.length > trace.idx.length) list.lastChild.remove();
  trace.idx.forEach((id, t) => {
    const old = list.children[t];
    const item =
      old ?? h("button", { type: "button", onclick: () => app.select({ t }), onkeydown: (event) => walk(event, t) });
    const text = shown(tokenizer, id);
    if (item.textContent !== text || item.title !== `token ${t}, id ${id}`) {
      item.textContent = text;
      item.title = `token ${t}, id ${id}`;
      item.setAttribute("aria-label", `token ${t}: ${text}, id ${id}`);
    }
    item.tabIndex = t === at.t ? 0 : -1;
    item.setAttribute("aria-pressed", t === at.t);
    if (!old) list.append(item);
  });
  const walk = (event, t) => {
    const to = { ArrowLeft: t - 1, ArrowRight: t + 1, Home: 0, End: app.trace.idx.length - 1 }[event.key];
    if (to === undefined || to < 0 || to >= app.trace.idx.length) return;
    event.preventDefault();
    app.select({ t: to });
    list.children[to].focus();
  };
  const chosen = list.children[at.t];
  list.scrollTop = chosen.offsetTop - list.offsetTop - list.clientHeight + chosen.offsetHeight + 8;
  list.scrollLeft = chosen.offsetLeft - list.offsetLeft - list.clientWidth + chosen.offsetWidth + 8;
}

function showBars(app) {
  const { tokenizer, at } = app;
  const list = element("bars");
  const best = likeliest(app.probs(), SHOWN);
  const last = at.t === app.trace.idx.length - 1;
  element("bars-title").textContent = last ? "Next token" : `Next token after token ${at.t}`;
  best.forEach((id, i) => {
    const item =
      list.children[i] ??
      list.appendChild(
        h(
          "li",
          {},
          h(
            "button",
            { type: "button" },
            h("code"),
            h("span", { class: "number" }),
            h("span", { class: "track" }, h("span", { class: "bar" })),
          ),
        ),
      );
    const press = item.firstChild;
    const [code, number, track] = press.children;
    const p = app.probs()[id];
    code.textContent = shown(tokenizer, id);
    number.textContent = percent(p);
    track.firstChild.style.width = `${100 * p}%`;
    press.dataset.id = id;
    press.dataset.p = p;
    press.setAttribute("aria-pressed", id === at.vocabulary);
    press.onclick = () => app.open(`probs:${app.at.t},${id}`);
  });
  while (list.children.length > best.length) list.lastChild.remove();
}

// --------------------------------------------------------------------------------------
// The map

/** The model from the text to the next token: a button for each part, and the selected token's numbers after it. */
class PipelineMap {
  constructor(app) {
    this.app = app;
    this.rows = [];
    const add = (label, path, parts) => this.rows.push(this.row(label, path, parts));
    add("Tokens", null, [["ids", "writing"]]);
    add("Embedding", "wte", [["vector", "embeddings"], ...(app.stack ? [["position", "positions"]] : [])]);
    if (app.encodes) add("Encoder", "source", [["read once", "transformer"]]);
    for (let i = 0; i < app.config.n_layer; i++) {
      if (app.stack) add(`Layer ${i + 1}`, `${app.stack}.blocks.${i}.output`, this.blockParts(i));
      else add(`Layer ${i + 1}`, `layers.${i}.activation`, [["neurons", "writing", i]]);
    }
    add("Head", "output", [
      [app.stack ? "norm" : "output", app.stack ? "norm" : "softmax"],
      ["softmax", "softmax"],
    ]);
    element("map").append(...this.rows.map(({ root }) => root));
  }

  blockParts(i) {
    const parts = [["attention", "attention", i]];
    if (this.app.encodes) parts.push(["cross", "transformer", i]);
    if (this.app.config.mlp !== "none") parts.push(["MLP", "residual", i]);
    return parts;
  }

  row(label, path, parts) {
    const canvas = h("canvas", { class: "thumb", "aria-hidden": "true" });
    const buttons = parts.map(([name, section, layer]) =>
      button(
        name,
        () => {
          if (layer !== undefined) this.app.select({ layer });
          this.app.goTo(section);
        },
        { "aria-label": `${label}: ${name}` },
      ),
    );
    const root = h(
      "li",
      {},
      h("span", { class: "map-label" }, label),
      h("span", { class: "map-parts" }, buttons),
      canvas,
    );
    return { root, canvas, path, label };
  }

  update() {
    const { app } = this;
    const layer = app.at.address?.match(/(?:blocks|layers)\.(\d+)/);
    const chosen = layer ? +layer[1] : app.at.layer;
    for (const { root, canvas, path, label } of this.rows) {
      const isChosen = label === `Layer ${chosen + 1}`;
      if (isChosen && this.chosen !== chosen) element("map").scrollLeft = root.offsetLeft - element("map").offsetLeft;
      root.classList.toggle("chosen", isChosen);
      const row =
        path === "source" ? app.trace.source.encoder.norm.output.at(-1) : path && lookUp(app.trace, path)[app.at.t];
      canvas.hidden = !row;
      if (row) paintRow(canvas, row);
    }
    this.chosen = chosen;
  }
}

function paintRow(canvas, row) {
  const max = row.reduce((most, x) => Math.max(most, Math.abs(x)), 0) || 1;
  canvas.width = row.length;
  canvas.height = 1;
  const colours = colourTable();
  const pixels = new ImageData(row.length, 1);
  row.forEach((x, i) => {
    pixels.data.set(colours[Math.round((255 * x) / max) + 255], 4 * i);
    pixels.data[4 * i + 3] = 255;
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

// --------------------------------------------------------------------------------------
// The arithmetic

const LARGEST = 8; // terms that are spelled out

/** What the selected number was computed from, term by term; each operand leads to its own arithmetic. */
class Drawer {
  constructor(app) {
    this.app = app;
    this.past = [];
    this.body = element("arithmetic");
  }

  reveal() {
    element("drawer").classList.add("open");
  }

  update() {
    const { app } = this;
    if (!app.at.address) {
      this.body.replaceChildren(
        h(
          "p",
          { class: "quiet" },
          "Select any number: a cell of a strip, or a next token. Its sum is spelled out here, and each operand " +
            "leads to its own.",
        ),
      );
      element("drawer").classList.remove("open");
      return;
    }
    const y = explainNumber(app.model, app.trace, app.at.address);
    if (document.activeElement !== document.body && !this.body.contains(document.activeElement))
      this.opener = document.activeElement;
    const focused = document.activeElement?.closest("#arithmetic") && document.activeElement.dataset.address;
    const rows = this.chosenTerms(y);
    this.body.replaceChildren(
      h(
        "div",
        { class: "drawer-head" },
        h("h3", {}, this.title(y)),
        h(
          "span",
          {},
          button("Back", () => this.back(), { disabled: !this.past.length }),
          button("Close", () => this.close()),
        ),
      ),
      h("p", { class: "value", "data-value": y.value }, digits(y.value)),
      h("p", { class: "formula" }, y.formula),
      h("table", { class: "terms" }, h("tbody", {}, rows)),
      ...this.more(y),
    );
    if (focused) this.body.querySelector("button:not([disabled])")?.focus();
  }

  title(y) {
    const { path, at } = parseAddress(y.address);
    const { tokenizer, trace } = this.app;
    if (path === "logits" || path === "probs") return `${y.title}: “${shown(tokenizer, at[1])}”`;
    const source = path.startsWith("source") || path.includes(".context.");
    const name = (t, ofSource) => `“${shown(tokenizer, (ofSource ? trace.source.idx : trace.idx)[t])}”`;
    if (at.length === 2) return `${y.title} (${name(at[0], source)})`;
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
    if (y.terms.length > 1) rows.push(this.line("sum", y.sum, "sum"));
    rows.push(...y.steps.map(({ text, value }) => this.line(text, value, "sum")));
    return rows;
  }

  row({ name, factors, value, exp }) {
    const parts = factors.flatMap((factor, i) => [i ? " × " : null, this.factor(factor)]);
    const product = exp === undefined ? value : value;
    const what = exp === undefined ? parts : [...parts, ` → exp(${digits(exp)})`];
    return h(
      "tr",
      { "data-term": value },
      h("th", { scope: "row" }, this.named(name)),
      h("td", {}, what),
      h("td", { class: "number" }, digits(product)),
    );
  }

  named(name) {
    const [, kind, i] = name.match(/^(key|token) (\d+)$/) ?? [];
    if (!kind) return name;
    const { trace, tokenizer, at } = this.app;
    const path = parseAddress(at.address).path;
    if (/logits|probs/.test(path)) return `“${shown(tokenizer, +i)}”`;
    if (kind === "token") return name;
    const keys = path.startsWith("source") || path.includes("cross_attn") ? trace.source.idx : trace.idx;
    return `${name} “${shown(tokenizer, keys[+i])}”`;
  }

  factor({ value, address, name, weight }) {
    const text = digits(value);
    if (weight) return h("b", { class: "weight", title: name }, text);
    if (!address) return h("span", { title: name }, text);
    return button(text, () => this.walk(address), {
      class: "operand",
      "data-address": address,
      title: name ?? titleOf(...Object.values(parseAddress(address))),
    });
  }

  line(text, value, kind = "") {
    return h(
      "tr",
      { class: kind, "data-term": kind ? null : value },
      h("th", { scope: "row", colspan: 2 }, text),
      h("td", { class: "number" }, digits(value)),
    );
  }

  /** The focus goes back to where the number was selected. */
  close() {
    this.app.select({ address: null });
    (this.opener?.isConnected ? this.opener : element("text")).focus({ preventScroll: true });
  }

  walk(address) {
    this.past.push(this.app.at.address);
    this.app.open(address);
  }

  back() {
    const address = this.past.pop();
    if (address && valueAt(this.app.trace, address) !== undefined) this.app.open(address);
    else this.update();
  }

  more(y) {
    const made = [];
    if (y.terms.length > LARGEST) {
      const details = h("details", {}, h("summary", {}, `All ${y.terms.length} terms`));
      details.addEventListener("toggle", () => {
        if (details.open && !details.querySelector("table")) {
          details.append(
            h(
              "div",
              { class: "scroll", tabindex: 0, role: "group", "aria-label": "all terms" },
              h(
                "table",
                { class: "terms" },
                h(
                  "tbody",
                  {},
                  y.terms.map((term) => this.row(term)),
                ),
              ),
            ),
          );
        }
      });
      made.push(details);
    }
    const effect = this.effect(y);
    return effect ? [effect, ...made] : made;
  }

  /** Of a neuron: what it adds to the logits, by its outgoing weights. */
  effect(y) {
    const { app } = this;
    const { path, at } = parseAddress(y.address);
    const [, block, layer] =
      path.match(/^((?:stack|decoder)\.blocks\.(\d+))\.feed_forward\.(?:hidden|activation)$/) ?? [];
    if (!block || (app.config.mlp === "gated" && path.endsWith("activation"))) return null;
    const { data, shape } = lookUp(app.model.weights, block).mlp.down_proj.weight;
    const row = Float64Array.from({ length: shape[0] }, (_, o) => y.value * data[o * shape[1] + at[1]]);
    const effect = effectOnLogits(app.model, app.trace, app.stack, { layer: +layer, branch: "mlp", t: at[0], row });
    if (!effect || !y.value) return null;
    const sorted = [...effect.keys()].sort((a, b) => effect[b] - effect[a]);
    const show = (id) => [shown(app.tokenizer, id), signed(effect[id])];
    return table(
      "Times its outgoing weights and the last norm: what it adds directly to logits",
      ["token", "logit"],
      [...sorted.slice(0, 4), ...sorted.slice(-4)].map(show),
      [1],
    );
  }
}

function signed(x) {
  return `${x < 0 ? "" : "+"}${digits(x)}`;
}

document.addEventListener("DOMContentLoaded", main);
