/* The page: one state, the worker's answer for its text, and the drawing of both. */

const SHOWN = 8; // number of bars
const LONGEST_WRITING = 500; // tokens, as in sample.py
const OPENING = 40; // tokens that the model writes if the page has no text to open with
const PANELS_EVERY = 150; // ms, while the model writes
const LONGEST_ADDRESS = 100000; // characters; Firefox refuses a megabyte
const ELSEWHERE = "Not for this model";
const FOLDED = 96; // height of the folded head in pixels, as in style.css
const element = (id) => document.getElementById(id);

async function main() {
  const { textContent: text, dataset } = element("data");
  const desk = new Desk(element("worker").textContent);
  const { problem, data, model } = await desk.ask("open", { text, checksum: dataset.checksum });
  if (problem) element("problem").textContent = problem;
  else new App(desk, data).start(data, model);
}

/** state: as requested; at: the state limited to the trace; trace: of the texts in `read`, null before the first. */
class App {
  constructor(desk, { task }) {
    this.desk = desk;
    this.chats = task === "chat";
    this.sections = [...(this.chats ? ["talk"] : []), "model", ...PANELS.map(({ id }) => id)];
    this.version = 0; // of the weights, which change while the page trains
    this.trace = this.read = this.at = this.state = null;
    this.panels = [];
    // are all sections built, is the text being computed, is the model writing
    this.complete = this.pending = this.going = false;
    // these resolve when the text is drawn, and when the last requested token is written
    this.settled = this.turn = Promise.resolve();
    desk.onQuestions = () => this.rest();
    desk.onMove = (moved) => this.move(moved);
  }

  /** Show a model, instead of the one before. */
  show(data, model) {
    const before = this.data && this.startTexts();
    Object.assign(this, { data, model, config: model.config, tokenizer: makeTokenizer(data.tokenizer) });
    this.translates = data.task === "translation";
    this.encodes = model.config.model === "transformer";
    this.stack = { window_mlp: null, gpt: "stack", transformer: "decoder" }[model.config.model];
    this.state ??= initialState(this.sections, this.startTexts());
    const unread = (char) => !data.tokenizer.alphabet.includes(char);
    if (before && (this.state.text === before.text || [...this.state.text].some(unread)))
      element("text").value = this.state.text = data.start;
    Object.assign(this.state, { number: null, trail: [], t: -1, next: -1, key: -1 });
    this.trace = this.read = null;
    element("tokens").replaceChildren(); // they have ids of the tokenizer before
    element("name").textContent = data.name;
    document.title = `HumptyGPT: ${data.name}`;
    element("about").textContent = describeRun(data);
    keepFocus(element("page"), () => {
      this.picture = new Picture(this);
      this.buildPanels();
    });
    this.markSection();
  }

  /** Show the first state. If the page has no translation, the model writes it. */
  startTexts() {
    if (this.chats) return { text: openingOf(this.data), source: "" };
    return this.translates ? { text: "", source: this.data.start } : { text: this.data.start, source: "" };
  }

  async start(data, model) {
    this.watchPanels();
    this.enterPicture = walkable(element("flow"));
    this.enterBars = walkable(element("bars"), { across: 2 });
    this.drawer = new Drawer(this);
    this.tour = new Tour(this);
    this.playground = new Playground(this, data);
    if (model) this.show(data, model);
    else await this.playground.begin();
    element("source-part").hidden = !this.translates;
    if (this.translates) element("text-label").textContent = "Its translation so far";
    element("page").hidden = false;
    element("input").append(element("problem"));
    element("problem").textContent = "";
    for (const id of ["text", "source"]) {
      element(id).addEventListener("input", (event) => this.typed(event));
      element(id).addEventListener("focus", () => this.stop()); // otherwise the model would overwrite the selection
    }
    element("greedy").onchange = ({ target }) =>
      this.change({ sampling: { ...this.state.sampling, greedy: target.checked } });
    element("write-one").onclick = () => this.writeOne().then(() => this.picture.lightUp());
    element("tour-start").onclick = () => this.tour.go(0);
    element("tour-start").hidden = this.stack !== "stack";
    element("skip").onclick = () => this.goTo(PANELS[0].id);
    element("go-on").onclick = () => (this.going ? this.stop() : this.goOn());
    listenToTokens(this);
    if (this.chats) this.talk = new Talk(this);
    dependenciesOf = (part) => this.operandsOf(part);
    darkScheme.addEventListener("change", () => this.draw());
    history.scrollRestoration = "manual";
    addEventListener("hashchange", (event) => this.restore(new URL(event.newURL).hash));
    addEventListener("beforeprint", () => {
      for (const panel of this.panels) this.renderPanel(panel);
      paintWaiting();
    });
    const given = new URLSearchParams(location.hash.slice(1)).has("text");
    await this.restore(location.hash);
    if (!given && this.translates) this.goOn({ greedy: true });
    else if (!given && !this.state.text) this.goOn({ greedy: false, most: OPENING });
    await this.renderAll(); // all of them ahead of time, so that none grows when it comes into view
    this.scrollTo(this.state.section);
    this.complete = true;
    this.rest();
    // on a phone, the field has a single line
    for (const id of ["text", "source"]) scrollToEnd(element(id));
  }

  // ----------------------------------------------------------------------------------
  // State -> address, trace and drawing

  /** Change the state; nothing else does. push: the browser's Back returns to the state before. ids: of its text. */
  change(changes, { push = false, ids } = {}) {
    if (push) this.keep();
    const { text, source } = this.state;
    this.state = { ...this.state, ...changes };
    if (push) this.keep("pushState");
    else this.keepSoon();
    if (!ids && this.trace && this.state.text === text && this.state.source === source) return this.draw();
    this.stop();
    return this.compute(ids);
  }

  /** Select something in the text that is shown. */
  select(changes, options) {
    const moved = ["t", "layer", "head"].some((name) => name in changes);
    this.change({ ...(moved && { key: -1 }), ...("t" in changes && { next: -1 }), ...changes }, options);
  }

  /** fresh: with the weights of this moment, if the page trains. */
  compute(ids, fresh = false) {
    const { text, source } = this.state;
    this.pending = true;
    this.rest();
    const asked = (this.asked = this.desk.ask("read", { text, source, ids, fresh }));
    this.settled = asked.then((answer) => (asked === this.asked ? this.take(answer) : this.settled));
    return this.settled;
  }

  take({ problem, ids, lost, skipped }) {
    const { text, source } = this.state;
    this.pending = false;
    this.rest();
    if (problem) return this.tell(problem);
    this.read = { text, source, ids, lost, skipped };
    this.trace = this.desk.trace;
    for (const id of ["text", "source"]) element(id).setAttribute("aria-invalid", skipped[id].length > 0);
    this.tell(`${this.skippedText()} ${this.lostText()}`.trim());
    this.draw();
  }

  /** Show the weights that the training has come to. */
  follow() {
    return this.compute(this.read?.text === this.state.text ? this.read.ids : undefined, true);
  }

  /** Have other weights, those of a step of the training. numbers: a list for each weight. */
  move({ numbers, steps }) {
    namedWeights(this.model).forEach(([, tensor], i) => (tensor.data = numbers[i]));
    this.model.meanOfHead = null;
    this.version++;
    this.data.steps = steps;
    this.describe();
  }

  describe() {
    Object.assign(this.data, this.playground.record());
    element("about").textContent = describeRun(this.data);
  }

  /** Mark the page as at rest if nothing is under way. */
  rest() {
    const open = this.desk.questions.size > 0;
    element("page").ariaBusy = !this.complete || this.pending || Boolean(this.going) || open;
  }

  /** Explain below the field which part of its text is not read, or why none is. */
  tell(text) {
    element("problem").textContent = text;
    element("problem").hidden = !text;
  }

  skippedText() {
    const { text, source } = this.read.skipped;
    const unknown = [...new Set([...source, ...text].map(({ char }) => `“${signs(char)}”`))];
    if (!unknown.length) return "";
    const alphabet = this.tokenizer.pieces.map((_, id) => shown(this.tokenizer, id));
    return (
      `This model does not know ${firstOf(unknown, ", ")}: ${unknown.length === 1 ? "it is" : "they are"} skipped. ` +
      `Its ${count(alphabet.length)} characters: ${firstOf(alphabet, " ")}`
    );
  }

  lostText() {
    const { lost, ids } = this.read;
    if (!lost) return "";
    const told = (n, what) =>
      `The context has no room for the last ${tokens(n)} of the ${what}: ${n === 1 ? "it is" : "they are"} not read.`;
    if (lost.source) return told(lost.source, "sentence");
    return lost.target ? told(lost.target, "translation") : "";
  }

  typed({ target }) {
    const fresh = this.translates && target.id === "source" ? { text: "" } : {};
    if (fresh.text === "") element("text").value = "";
    const settled = this.change({ ...fresh, [target.id]: target.value, t: -1, next: -1, key: -1 });
    if (fresh.text === "") settled.then(() => this.state.text === "" && this.trace && this.goOn({ greedy: true }));
  }

  /** Write the hash, but not too often, because browsers limit it. */
  keepSoon() {
    clearTimeout(this.keeping);
    this.keeping = setTimeout(() => this.keep(), 150);
  }

  keep(how = "replaceState") {
    clearTimeout(this.keeping);
    const hash = writeAddress(this.state, this.playground.address());
    if (hash === this.hash || hash.length > LONGEST_ADDRESS) return;
    try {
      history[how](null, "", hash);
      this.hash = hash;
    } catch {
      this.keeping = setTimeout(() => this.keep(), 2000); // Safari refuses more than 100 in 10 s
    }
  }

  /** hash: the event's hash, since keep() may have replaced the address meanwhile. */
  restore(hash) {
    if (hash === this.hash) return this.settled;
    clearTimeout(this.keeping);
    this.hash = hash;
    const state = readAddress(hash, this.sections, this.state);
    for (const id of ["text", "source"]) if (element(id).value !== state[id]) element(id).value = state[id];
    this.stop();
    const drawn = this.change(state);
    this.scrollTo(state.section);
    return drawn;
  }

  /** Limit the state to the trace. */
  resolve() {
    const { trace } = this;
    this.at = resolve(this.state, this.model, trace, this.stack);
    this.ensureLogits(this.at.t);
    const { path, at } = parseAddress(this.at.number ?? ":");
    if (/^(logits|probs)$/.test(path) && at[0] < trace.idx.length) this.ensureLogits(at[0]);
    if (this.at.next < 0) this.at.next = likeliest(this.probs(), 1)[0];
    if (this.at.number && typeof valueAt(trace, this.at.number) !== "number") this.at.number = null;
  }

  ensureLogits(t) {
    const { trace } = this;
    if (trace.logits[t]) return;
    trace.logits[t] = logitsOf(this.model, trace.output[t]);
    trace.probs[t] = probabilities(this.model, trace.logits[t]);
  }

  get source() {
    return this.trace.source?.idx;
  }

  logits() {
    return this.trace.logits[this.at.t];
  }

  probs() {
    return this.trace.probs[this.at.t];
  }

  // ----------------------------------------------------------------------------------
  // Numbers

  /** Spell out the number at this address. If it belongs to another token or head, that one becomes selected. */
  open(address, trail = []) {
    if (address === this.state.number) return this.drawer.enter();
    const changes = changesTo(address);
    if (changes.t === this.at.t) delete changes.t;
    if ("t" in changes && !("next" in changes)) changes.next = -1;
    this.change({ ...changes, trail }, { push: true });
    this.drawer.reveal();
  }

  /** The path from which the numbers of a path were copied. */
  resolvePath(path) {
    return resolvePath(this.model, this.trace, path);
  }

  /** The index of the selected number in a row; -1 if it has none. */
  selectedIn(path, ...before) {
    if (!this.at.number) return -1;
    const { path: selected, at } = parseAddress(this.at.number);
    if (this.resolvePath(selected) !== this.resolvePath(path)) return -1;
    return before.every((index, i) => index === at[i]) ? at.at(-1) : -1;
  }

  /** The paths of the numbers that a part is computed from. */
  operandsOf(part) {
    let at = [this.at.t, 0];
    if (/\.(scores|weights)$/.test(part)) at = [this.at.head, ...at];
    if (/\.(mean|std|rms)$/.test(part)) at = [this.at.t];
    try {
      const operands = operandsOf(explainNumber(this.model, this.trace, `${part}:${at}`));
      const addresses = operands.map(({ address }) => address).filter(Boolean);
      return [...new Set(addresses.map((address) => this.resolvePath(parseAddress(address).path)))];
    } catch {
      return []; // the part belongs to another text until its strip is redrawn
    }
  }

  // ----------------------------------------------------------------------------------
  // Sections

  buildPanels() {
    const nav = element("sections");
    for (const place of [nav, element("panels")]) place.replaceChildren();
    for (const { root } of this.panels) this.watches.forEach((watch) => watch.unobserve(root));
    strips.clear();
    this.panels = [];
    const chip = (id, number, title, name) => {
      const press = button(`${number} ${name}`, () => this.goTo(id), { title: title === name ? null : title });
      return nav.appendChild(press);
    };
    const add = (panel, pressed, place, [tag, level], ...number) => {
      const heading = h(level, { id: `title-${panel.id}`, tabindex: -1 }, ...number, panel.title);
      const root = h(tag, { id: panel.id, "aria-labelledby": `title-${panel.id}` }, heading);
      place.append(root);
      const made = { root, heading, chip: pressed, built: null, visible: false, dirty: true };
      this.panels.push({ ...panel, ...made });
    };
    this.overview = chip("model", "", "The model", "Model");
    const missing = PANELS.filter((panel) => this.lackOf(panel));
    const present = PANELS.filter((panel) => !missing.includes(panel));
    present.forEach((panel, i) => {
      const pressed = chip(panel.id, i + 1, panel.title, panel.short ?? panel.title);
      add(panel, pressed, element("panels"), ["section", "h2"], h("span", { class: "count" }, i + 1));
    });
    if (missing.length) {
      const pressed = chip(missing[0].id, "", ELSEWHERE, "Missing here");
      const end = h("section", { class: "elsewhere" }, h("h2", {}, ELSEWHERE));
      element("panels").append(end);
      for (const panel of missing) add(panel, pressed, end, ["article", "h3"]);
    }
    for (const { root } of this.panels) this.watches.forEach((watch) => watch.observe(root));
  }

  /** Watch which sections are in sight, and how high they and the bars above them are. */
  watchPanels() {
    const nav = element("sections");
    this.enterSections = walkable(nav, { entry: () => this.chipOfNow() });
    const inSight = new IntersectionObserver((entries) => this.scrolled(entries), { rootMargin: "150px 0px" });
    this.watches = [inSight, new ResizeObserver((entries) => this.keepPlace(entries))];
    const scrolled = () => {
      this.fold();
      this.findSection();
    };
    addEventListener("scroll", scrolled, { passive: true });
    const stuck = new ResizeObserver(() => {
      const top = element("top");
      if (!document.body.classList.contains("folded")) this.full = top.offsetHeight;
      top.style.setProperty("--full", `${this.full}px`);
      document.documentElement.style.setProperty("--stuck", `${this.heightOfBars()}px`);
    });
    for (const id of ["top", "sections-part"]) stuck.observe(element(id));
    element("unfold").onclick = () => this.fold(!document.body.classList.contains("unfolded"));
  }

  /** The height in pixels at the top of the window that always covers the page. */
  heightOfBars() {
    if (getComputedStyle(element("sections-part")).position !== "sticky") return 0;
    const unfolded = document.body.classList.contains("unfolded");
    return (unfolded ? element("top").offsetHeight : FOLDED) + element("sections-part").offsetHeight;
  }

  /** Fold the head to a few lines while sections are read. It keeps its place in the page, so nothing jumps.
  unfolded: the head covers the section as long as the reader wants it. */
  fold(unfolded = document.body.classList.contains("unfolded")) {
    const { classList } = document.body;
    const below = this.heightOfBars() > 0 && scrollY > element("playground").offsetHeight + this.full - FOLDED;
    if (classList.contains("folded") === (below && !unfolded) && !unfolded) return;
    classList.toggle("unfolded", below && unfolded);
    classList.toggle("folded", below && !unfolded);
    element("unfold").hidden = !below;
    element("unfold").ariaExpanded = below && unfolded;
    scrollToEnd(element("text"));
  }

  async renderAll() {
    for (const panel of this.panels) {
      await nextMessage();
      if (!this.going || !this.complete) this.renderPanel(panel);
    }
  }

  scrolled(entries) {
    for (const { target, isIntersecting } of entries)
      Object.assign(this.panels.find(({ root }) => root === target) ?? {}, { visible: isIntersecting });
    this.drawPanels();
  }

  /** Until the focus moves, keep this element where it is in the window. */
  hold(element) {
    this.held = element && { element, top: element.getBoundingClientRect().top + scrollY };
  }

  /** Scroll along if a section above the current one changes its height, or if the held element moves. */
  keepPlace(entries) {
    let shift = 0;
    const reading = this.panels.findIndex(({ id }) => id === this.state.section);
    for (const { target, borderBoxSize } of entries) {
      const i = this.panels.findIndex(({ root }) => root === target);
      if (i < 0) continue; // of a model that is no longer shown
      const height = borderBoxSize[0].blockSize;
      if (i < reading) shift += height - (this.panels[i].height ?? height);
      this.panels[i].height = height;
    }
    const { element, top } = this.held ?? {};
    if (element === document.activeElement) {
      this.hold(element);
      shift = this.held.top - top;
    }
    if (shift) scrollBy({ top: shift, behavior: "instant" });
  }

  findSection() {
    const scrollsItself = this.jumping || !this.tour.root.hidden;
    if (scrollsItself || !this.complete || this.state.section === "talk") return;
    const top = this.heightOfBars() + 60;
    const found = this.panels.findLast(({ root }) => root.getBoundingClientRect().top <= top);
    const id = found && scrollY > 0 ? found.id : "model";
    if (id === this.state.section) return;
    this.state.section = id;
    this.markSection();
    this.keepSoon();
  }

  chipOfNow() {
    return this.panels.find(({ id }) => id === this.state.section)?.chip ?? this.overview;
  }

  markSection() {
    const current = this.chipOfNow();
    this.enterSections();
    for (const chip of element("sections").children) chip.setAttribute("aria-current", chip === current);
    element("sections").scrollLeft = current.offsetLeft - element("sections").offsetLeft - 60;
  }

  /** layer: the layer of the part of the picture that led here. A number that was opened elsewhere is closed. */
  goTo(section, changes = {}, ids) {
    this.fold(false);
    const left = section === this.state.section ? {} : { number: null, trail: [] };
    this.change({ ...left, ...changes, section }, { push: true, ids });
    this.scrollTo(section);
    const panel = this.panels.find(({ id }) => id === section);
    (panel?.heading ?? element("text")).focus({ preventScroll: true });
  }

  async scrollTo(section) {
    this.talk?.show(section === "talk");
    this.jumping = true;
    this.markSection();
    const panel = this.panels.find(({ id }) => id === section);
    if (panel) this.renderPanel(panel);
    const place = panel?.root.closest("section");
    const jump = () => (place ? scrollBy(0, place.getBoundingClientRect().top - this.heightOfBars()) : scrollTo(0, 0));
    jump();
    for (const n of [1, 2]) {
      await frames(n); // until the drawer is closed, and its strips have their heights
      jump();
    }
    this.jumping = false;
  }

  // ----------------------------------------------------------------------------------
  // Drawing

  draw() {
    element("greedy").checked = this.state.sampling.greedy;
    if (!this.trace) return;
    this.resolve();
    showTokens(this);
    showBars(this);
    this.picture.update();
    this.drawer.update();
    for (const panel of this.panels) panel.dirty = true;
    this.drawPanels();
  }

  /** What a panel needs and this run has not. */
  lackOf({ needs = [] }) {
    return needs.map((name) => NEEDS[name]).find(([has]) => !has(this));
  }

  /** Update the visible panels, each in a task of its own, so that keys are handled in between. */
  async drawPanels() {
    const soon = performance.now() < (this.panelsAt ?? 0) + PANELS_EVERY;
    if (this.going && (this.drawing || soon)) return; // if each token began anew, a slow machine would draw nothing
    const drawing = (this.drawing = {});
    this.panelsAt = performance.now();
    for (const panel of this.panels) {
      if (!panel.visible || !panel.dirty) continue;
      await nextMessage();
      if (this.drawing !== drawing) return;
      this.renderPanel(panel);
    }
    this.drawing = null;
  }

  renderPanel(panel) {
    if (!panel.dirty) return;
    if (!panel.built) {
      const lack = this.lackOf(panel);
      if (!this.trace && !lack && !panel.alone) return;
      const chapter = panel.chapter && ` In plain Python: “${panel.chapter}” in from_scratch.py.`;
      const intro = h("p", { class: "quiet" }, panel.intro, chapter);
      const parts = lack ? missingNote(lack[1], lack[2]) : panel.build(this);
      panel.built = group("panel-body drawn", inRows([intro, parts]));
      panel.root.append(panel.built.root);
    }
    if (!this.trace) return;
    panel.dirty = false;
    panel.built.update();
  }

  // ----------------------------------------------------------------------------------
  // Writing

  /** Append a token to the first n tokens of the text, by default to all. Returns false if the text has ended. */
  append(id, n = this.read.ids.length, push = false) {
    if (id === this.tokenizer.eot) return this.end(`The ${this.translates ? "translation" : "text"} has ended.`);
    if (this.translates && n === this.read.ids.length && this.trace.idx.length === this.config.block_size)
      return this.end("The context is full: there is no room for more of the translation.");
    const ids = [...this.read.ids.slice(0, n), id];
    const text = element("text");
    this.state = { ...this.state, text: this.tokenizer.decode(ids), t: -1, next: -1, key: -1 };
    text.value = this.state.text;
    scrollToEnd(text);
    if (push) this.keep("pushState");
    else this.keepSoon();
    return this.compute(ids).then(() => true);
  }

  end(reason) {
    element("ended").textContent = reason;
    return false;
  }

  /** Write one token after the requested ones before it, if it is still wanted then. */
  writeOne(greedy, wanted = () => true) {
    element("ended").textContent = "";
    this.turn = this.turn
      .then(() => this.settled)
      .then(() => this.trace && wanted() && this.append(this.chooseNext(greedy)));
    return this.turn;
  }

  chooseNext(greedy = this.state.sampling.greedy) {
    const { logits } = this.trace;
    const { probs } = filtered(logits.at(-1), this.model.tokenizer_vocab_size, { ...this.state.sampling, greedy });
    return drawFrom(probs, Math.random());
  }

  /** Write until the text ends, something else is typed, or stop() is called. The browser paints in between. */
  async goOn({ greedy, most = LONGEST_WRITING } = {}) {
    if (this.going) return;
    const going = (this.going = {});
    const wanted = () => this.going === going;
    element("go-on").textContent = "Stop";
    for (let written = 0; wanted() && written < most; written++) {
      if (!(await this.writeOne(greedy, wanted))) break;
    }
    const { complete } = this;
    this.complete = false; // the page is not at rest until its sections have the new text
    for (const panel of this.panels) panel.dirty = true;
    if (wanted() || !this.going) this.stop();
    await this.renderAll();
    this.complete ||= complete;
    this.rest();
  }

  stop() {
    this.going = false;
    element("go-on").textContent = "Continue";
    this.rest();
  }

  /** Continue from the selected token with another next token. */
  choose(id) {
    if (!this.trace) return; // a new model is being opened
    const { t } = this.at;
    const later = this.trace.idx.length - 1 - t;
    this.stop();
    this.keep();
    this.append(id, this.read.ids.length - later, true);
  }
}

document.addEventListener("DOMContentLoaded", main);
