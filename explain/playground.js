/* The playground: a text, a button that trains on it, and knobs. The worker trains; here are the curves and the samples.
The rest of the page shows the weights of the moment. */

/** {key of a config file: [its name, its choices, what it is]} */
const KNOBS = {
  n_embd: ["Size", [16, 32, 64, 128], "how many numbers the model has for a character"],
  n_layer: ["Layers", [1, 2, 4, 8], "how many blocks of attention and MLP follow one another"],
  n_head: ["Heads", [1, 2, 4, 8], "how many places each layer attends to in parallel"],
  learning_rate: [
    "Learning rate",
    [0.0001, 0.0003, 0.001, 0.002, 0.004, 0.01, 0.03, 0.1, 1, 10],
    "how far a step of training moves the weights",
  ],
  max_iters: ["Steps", [100, 300, 1000, 3000, 10000], "how many steps Train takes; the learning rate falls over them"],
  batch_size: ["Batch", [1, 2, 4, 8, 16], "pieces of the text in each step"],
  block_size: ["Context", [16, 32, 64, 128, 256], "characters that the model sees at once"],
  position: ["Positions", Object.keys(POSITIONS), "how the model is told the order of the characters"],
  norm: ["Norms", Object.keys(NORMS), "what brings the numbers to one scale"],
  block: ["Block", Object.keys(BLOCKS), "where norms and residual connections are; plain: no residual ones"],
  mlp: ["MLP", Object.keys(MLPS), "the small network in each layer"],
  activation: ["Activation", Object.keys(ACTIVATIONS), "the function after each neuron's sum"],
  mask: ["Mask", ["causal", "none"], "causal: a character sees only those before it"],
  optimizer: ["Optimizer", ["adamw", "muon", "normuon"], "the rule by which the gradient moves the weights"],
  seed: ["Seed", [1, 2, 3, 4, 5], "which random numbers it starts with"],
};
const FIRST = 4; // knobs in sight; the others are under More
const OF_TRAINING = ["batch_size", "max_iters", "learning_rate", "optimizer", "seed"];
/** What a new page begins with, and with each of its texts, where that is not the default of a config. */
const PLAIN = { n_layer: 2, n_head: 4, n_embd: 64, block_size: 64, position: "rotary", activation: "relu" };
const SHORT = { batch_size: 8, warmup_iters: 10, max_iters: 300, learning_rate: 0.004, seed: 1 };
const OWN = "Your own text";
const COMPARED = "Sonnets by Shakespeare"; // on which ideas are compared instead of on a text without a validation part
const LINKED = 1000; // characters of a text that are part of an address
const EDITABLE = 20000; // characters of a text that can be edited in the page
const LONGEST = 2e6; // characters that are learned
const EARLIER = 3; // trainings whose curves stay

class Playground {
  /** data: of a page that begins with a text, or of a run. */
  constructor(app, { texts, config, training, text, model, task }) {
    this.texts = texts ?? (text ? { "The beginning of its own text": text } : {});
    for (const name in this.texts) this.texts[name] = this.texts[name].trimStart(); // no empty line above it
    Object.assign(this, { app, config, defaults: { config, settings: training } });
    this.training = { ...training, ...(config && SHORT) };
    this.root = element("playground");
    if (!config && (model.model !== "gpt" || task !== "language modelling" || !knowsRules(training))) return;
    this.names = Object.keys(KNOBS).filter((name) => config || OF_TRAINING.includes(name));
    const initial = { ...config, ...this.training, ...(config && PLAIN), mask: "causal" };
    this.initial = Object.fromEntries(this.names.map((name) => [name, initial[name]]));
    this.knobs = { ...this.initial };
    this.now = null; // {text, knobs, train and val: [step, loss] each, samples: [step, text] each, first, step, ms}
    this.earlier = []; // earlier trainings, in the same form
    this.own = ""; // the text that was typed or opened
    this.single = Promise.resolve(); // resolves when the last single step is taken
    this.running = null; // resolves when the training pauses
    this.round = ""; // which of several models this is
    app.desk.onEvent = (news) => this.take(news);
    addEventListener("beforeunload", (event) => this.now?.step > this.now?.first && event.preventDefault());
    this.build();
    this.readAddress(location.hash);
  }

  // ----------------------------------------------------------------------------------
  // Controls

  build() {
    const { config, app } = this;
    this.pickText = picker("Text", [...Object.keys(this.texts), OWN], 0, (i) => this.chooseText(i));
    const file = h("input", { type: "file", class: "unseen", onchange: () => this.readFile(file.files[0]) });
    const open = h("label", { class: "control file" }, file, "Open a file");
    this.field = h("textarea", { rows: 4, dir: "auto", spellcheck: false, "aria-label": "The text that it learns" });
    this.field.oninput = () => this.edit(this.field.value);
    this.note = h("p", { class: "note" });
    this.go = button("Train", () => (this.running ? this.pause() : this.train()), { class: "main" });
    const one = button("One step", () => (this.single = this.single.then(() => this.train(1))));
    const over = button("Start over", () => this.begin());
    this.knobRows = [this.names.slice(0, FIRST), this.names.slice(FIRST)].map((names) => this.buildKnobs(names));
    const [knobs, rest] = this.knobRows;
    this.ideas = config && this.buildIdeas();
    const more = [controlRow(one, over), rest, this.ideas, this.buildSaving()];
    this.more = h("details", { open: !config }, h("summary", {}, "More"), group("drawn", more).root);
    this.status = h("p", { class: "status" });
    [this.advice, this.said] = [0, 1].map(() => h("p", { role: "status" }));
    this.chart = new Chart("loss of training and validation at each step");
    this.samples = h("ol", { class: "samples" });
    const inside = button("Look inside", () => app.tour.go(0));
    const without = button("Take an idea away", () => this.showIdeas());
    const own = button(OWN, () => this.chooseText(Object.keys(this.texts).length));
    this.next = h("p", { class: "controls", hidden: true }, "And now?", inside, config && [without, own]);
    const learns = [controlRow(this.pickText, open), this.field, this.note, knobs, this.go, this.more];
    const said = [this.status, this.advice, this.said, this.next];
    this.watched = group("drawn", h("h3", {}, "What it writes"), this.samples, this.chart, said).root;
    const columns = group("training", group("drawn", learns), this.watched);
    const parts = group("playing drawn", config && h("h2", {}, "Train a GPT"), columns).root;
    this.root.append(config ? parts : h("details", {}, h("summary", {}, "Train it further"), parts));
    this.root.hidden = false;
    this.root.ondragover = (event) => event.preventDefault();
    this.root.ondrop = (event) => {
      const [file] = event.dataTransfer.files;
      if (!file) return; // a dragged text goes to the field
      event.preventDefault();
      this.readFile(file);
    };
  }

  /** Knobs, and below them what the one is that has the focus or is pointed at. */
  buildKnobs(names) {
    const meaning = h("p", { class: "note" });
    const pickers = names.map((name) => {
      const [label, , does] = KNOBS[name];
      const options = this.choices(name);
      const root = picker(label, options, 0, (i) => this.turn({ [name]: options[i] }));
      root.dataset.knob = name;
      const explain = () => (meaning.textContent = `${label}: ${does}. In a config file, ${name}.`);
      if (!meaning.textContent) explain();
      for (const event of ["focusin", "pointerenter"]) root.addEventListener(event, explain);
      return { root, update: () => root.set(options.indexOf(this.knobs[name])) };
    });
    return group("drawn", group("knobs", pickers), meaning);
  }

  choices(name) {
    return [...new Set([...KNOBS[name][1], this.initial[name]])];
  }

  chooseText(i) {
    const name = Object.keys(this.texts)[i] ?? OWN;
    this.pickText.set(i);
    this.setText(this.texts[name] ?? this.own);
    if (name === OWN) this.field.focus();
  }

  setText(text) {
    this.text = beginning(text, LONGEST);
    this.field.readOnly = text.length > EDITABLE;
    const shown = this.field.readOnly ? `${beginning(text, 2000)} …` : text;
    if (this.field.value !== shown) this.field.value = shown;
    this.note.textContent =
      `${count(text.length)} characters${this.field.readOnly ? "; the first 2,000 are shown" : ""}` +
      `${text.length > LONGEST ? ` and the first ${count(LONGEST)} learned` : ""}. A text file can be dropped here. ` +
      `The address of this page carries your knobs${this.learns() === null ? ", but not so long a text" : " and text"}.`;
    this.turn({});
  }

  edit(text) {
    this.own = text;
    this.pickText.set(Object.keys(this.texts).length);
    this.setText(text);
  }

  async readFile(file) {
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
      this.edit(text.replaceAll("\r\n", "\n"));
    } catch {
      this.tell(`${file.name} is not a text in UTF-8. Save it as text with this encoding, and open it again.`);
    }
  }

  /** What an address says of the text: its name, or all of it if it is short; null: nothing. */
  learns() {
    const { texts, text } = this;
    const name = Object.keys(texts).find((each) => texts[each] === text);
    return name ?? (text.length <= LINKED ? text : null);
  }

  /** What an address says of this: the knobs that are not as at first, and the text. */
  address() {
    if (!this.knobs) return {};
    const { knobs, initial, texts } = this;
    const changed = this.names.filter((name) => knobs[name] !== initial[name]).map((name) => [name, knobs[name]]);
    const learns = this.learns();
    if (learns && learns !== Object.keys(texts)[0]) changed.push(["learns", learns]);
    return Object.fromEntries(changed);
  }

  readAddress(hash) {
    const query = new URLSearchParams(hash.slice(1));
    for (const [i, name] of this.names.entries()) {
      const given = this.choices(name).find((choice) => `${choice}` === query.get(name));
      if (given === undefined) continue;
      this.knobs[name] = given;
      this.more.open ||= i >= FIRST;
    }
    const learns = query.get("learns");
    const i = Object.keys(this.texts).indexOf(learns);
    if (learns && i < 0) this.edit(learns);
    else this.chooseText(Math.max(i, 0));
  }

  /** Questions of the ladder: each trains the model with and without an idea. */
  buildIdeas() {
    let arms;
    const says = h("p", { class: "note" });
    const choose = (i) => {
      const [changes, text] = Object.values(IDEAS)[i];
      arms = changes;
      says.textContent = `${text}${/\d\./.test(text) ? OF_SONNETS : ""}`;
    };
    choose(0);
    const root = picker("Idea", Object.keys(IDEAS), 0, choose);
    const row = controlRow(root, button("Try it", () => this.compare(arms)));
    return group("drawn", h("h3", {}, "Take an idea away"), h("p", { class: "note" }, TRIED), row, says).root;
  }

  showIdeas() {
    this.more.open = true;
    this.ideas.querySelector("select").focus();
  }

  /** Train a model for each of these changes of the first settings, one after another, until one is paused. Then set
  the knobs as they were. */
  async compare(arms) {
    const before = { ...this.knobs };
    if (this.text.length < 10 * LEAST_HELD) this.chooseText(Object.keys(this.texts).indexOf(COMPARED));
    for (const [i, changes] of arms.entries()) {
      if (arms[1]) this.round = `Model ${i + 1} of ${arms.length}: `;
      this.turn({ ...this.initial, ...changes });
      if (!(await this.begin())) break;
      await this.train();
      if (this.now.step < this.knobs.max_iters) break;
    }
    this.round = "";
    this.turn(before);
  }

  buildSaving() {
    const files = [
      ["playground.pt", "the model", () => torchSave(checkpointOf(this.trained())), "python sample.py --out_dir=playground.pt"],
      ["playground.py", "its settings", () => new Blob([configFile(this.trained())]), "python train.py playground.py"],
      ["playground.txt", "its text", () => new Blob([this.now.text]), "python train.py --input=playground.txt --minutes=3"],
    ];
    const item = ([file, what, make, command]) =>
      h("li", {}, button(file, () => this.save(file, make)), ` ${what}, for `, h("code", {}, command));
    const shown = this.config ? files : files.slice(0, 1);
    return group("drawn", h("h3", {}, "Save it for HumptyGPT in Python"), h("ul", { class: "files" }, shown.map(item)));
  }

  /** What is saved: the model of this moment. */
  trained() {
    const { app, now, training, defaults } = this;
    const { causal, ...model } = app.config;
    const settings = { ...training, ...only(now.knobs, training) };
    const tokens = now.step * settings.batch_size * model.block_size;
    const progress = { ...this.record().progress, tokens, seconds: (now.ms * (now.step - now.first)) / 1000 };
    const { tokenizer } = app.data;
    return { config: model, settings, defaults, tokenizer, weights: app.model.weights, progress };
  }

  save(file, make) {
    const { name } = this.app.data.tokenizer;
    if (!this.now?.step) return this.tell("There is nothing to save before the first step.");
    if (name !== "char") return this.tell(`Not saved: only tokenizers of characters are written here, not ${name}.`);
    if (this.now.knobs.mask === "none") return this.tell("Not saved: model.py always has the mask.");
    h("a", { href: URL.createObjectURL(make()), download: file }).click();
    this.tell(`${file} is saved.`);
  }

  /** Set knobs. They hold for the next training. */
  turn(knobs) {
    Object.assign(this.knobs, knobs);
    for (const row of this.knobRows) row.update();
    if (this.app.state) this.app.keepSoon();
    if (!this.changed || !this.now) return this.tell("");
    this.tell(`${this.running ? "Paused. " : ""}Train begins a new model with this.`);
    this.pause();
  }

  /** Have the text or the knobs changed since the training began? */
  get changed() {
    const { now, knobs, text, names } = this;
    return !now || text !== now.text || names.some((name) => knobs[name] !== now.knobs[name]);
  }

  tell(text, place = this.said) {
    if (place.textContent !== text) place.textContent = text; // otherwise it would be announced again
  }

  // ----------------------------------------------------------------------------------
  // Training

  /** What hinders the training; "" if nothing does. */
  problem() {
    if (!this.text.trim()) return "There is no text to learn from: type or paste one, or open a file.";
    return new Set(this.text).size < 2 ? "A text of one character only has nothing to predict: add others." : "";
  }

  /** Begin a training. The curve of the one before stays, if it was of the same text. */
  async begin() {
    await this.pause();
    const { app, text, knobs } = this;
    const config = this.config && { ...this.config, ...only(knobs, this.config), causal: knobs.mask === "causal" };
    const training = { ...this.training, ...only(knobs, this.training) };
    const problem = this.problem();
    if (!problem) this.status.textContent = "Reading the text …";
    const begun = problem ? { problem } : await app.desk.ask("begin", { text, config, training });
    if (!begun.progress) {
      this.tell(begun.problem ?? ""); // no problem if a newer call has replaced this one
      return false;
    }
    const before = this.now?.text === text ? [...this.earlier, this.now] : [];
    this.earlier = before.filter(({ step, first }) => step - first >= 50).slice(-EARLIER);
    this.now = { text, knobs: { ...knobs }, train: [], val: [], samples: [], first: begun.progress.step };
    const kind = JSON.stringify([begun.model?.config, begun.data?.tokenizer]);
    if (begun.model && kind !== this.kind) app.show(begun.data, begun.model);
    this.kind = kind;
    this.tell("");
    this.take(begun.progress);
    await app.follow();
    return true;
  }

  /** Take this many steps, or all that are left of max_iters. If the text or a knob has changed, begin anew before. */
  async train(steps) {
    this.next.hidden = true;
    if (this.changed && !(await this.begin())) return;
    await this.pause();
    const { step, first } = this.now;
    this.until = step + (steps ?? this.knobs.max_iters - ((step - first) % this.knobs.max_iters));
    this.go.textContent = "Pause";
    const topOf = (part) => part.getBoundingClientRect().top;
    if (topOf(this.watched) > topOf(this.go)) this.go.scrollIntoView(); // as on a phone, which has one column
    this.running = this.app.desk.ask("train", { until: this.until });
    await this.running;
    this.running = null;
    this.go.textContent = "Train";
    this.next.hidden = Boolean(steps) || this.now.step < this.until;
    await this.app.follow();
    this.app.describe(); // the worker may have moved the weights before it told of the last step
    this.draw();
  }

  /** Resolves when no training is under way. */
  pause() {
    if (this.running) this.app.desk.ask("train", { until: 0 });
    return this.running;
  }

  async back(step) {
    await this.pause();
    await this.app.desk.ask("back", { step });
    this.now.step = step;
    await this.app.follow();
    this.draw();
  }

  /** News of the training. After an earlier step was gone back to, they replace what followed it. */
  take({ step, losses, kept, ms }) {
    const { now, app } = this;
    const from = losses[0]?.[0] ?? Infinity;
    now.train = [...now.train.filter(([at]) => at < from), ...losses];
    const isNew = kept.at(-1).step !== now.val.at(-1)?.[0];
    now.val = kept.map(({ step, val_loss }) => [step, val_loss]);
    if (isNew) now.samples = kept.map(({ step, sample }) => [step, app.tokenizer.decode(sample)]);
    Object.assign(now, { step, ms });
    this.draw(isNew);
    if (!this.running || this.following) return;
    this.following = app.follow().then(() => (this.following = null));
  }

  /** The training as that of a run: progress and metrics. */
  record() {
    const { train, val, step } = this.now;
    const metrics = [
      ...binnedMeans(train).map(([iter, train_loss]) => ({ kind: "train", iter, train_loss })),
      ...val.map(([iter, val_loss]) => ({ kind: "eval", iter, val_loss })),
    ];
    const [best_iter, best_val_loss] = this.evaluated;
    return { progress: { iter: step, best_iter, best_val_loss }, metrics };
  }

  /** The last evaluation up to the present step: [step, loss]. */
  get evaluated() {
    const { val, step } = this.now;
    return val.findLast(([at]) => at <= step);
  }

  // ----------------------------------------------------------------------------------
  // What comes of it

  draw(samplesToo = true) {
    const { now, earlier, app } = this;
    const V = app.model.tokenizer_vocab_size;
    const guessing = Math.log(V);
    const speed = now.ms ? `: ${now.ms.toFixed(0)} ms a step` : "";
    const left = this.running ? `, ${count(Math.ceil(((this.until - now.step) * now.ms) / 1000))} s to go` : "";
    const guess = `Guessing among ${tokens(V)} has a loss of ${guessing.toFixed(2)}.`;
    this.status.textContent = `${this.round}Step ${count(now.step)}${speed}${left}. ${guess}`;
    const named = (each) => differences(each.knobs, now.knobs);
    const lines = earlier.map((each, i) => ({ name: named(each), points: each.val, colour: `before-${i}` }));
    lines.push({ name: "validation", points: now.val, colour: 1 });
    if (now.train.length) lines.unshift({ name: "training", points: binnedMeans(now.train), colour: 0 });
    this.chart.show(lines, { name: "guessing", y: guessing }, 1.5 * guessing);
    this.tell(this.verdict(guessing), this.advice);
    const goBack = (step) =>
      button(count(step), () => this.back(step), { class: "operand", "aria-current": step === this.evaluated[0] });
    const sample = ([step, text]) => h("li", {}, goBack(step), h("code", { dir: "auto" }, text));
    const drawSamples = () => this.samples.replaceChildren(...now.samples.map(sample).reverse());
    if (samplesToo) keepFocus(this.samples, drawSamples, true);
  }

  /** What a reader should know about the losses. */
  verdict(guessing) {
    const { knobs, train, val, text } = this.now;
    const [, loss] = this.evaluated;
    const [bestStep, best] = val.reduce((a, b) => (b[1] < a[1] ? b : a));
    const worst = Math.max(...train.map(([, loss]) => loss));
    if (!train.length) return "";
    if (Number.isNaN(worst)) return `${EXPLODED} Its numbers are no longer finite, so it stopped.`;
    if (worst > 1.5 * guessing) return `${EXPLODED} Its loss was up to ${count(Math.round(worst))}.`;
    if (knobs.mask === "none" && loss < guessing / 3) return CHEATS;
    if (text.length < 10 * LEAST_HELD) return loss < KNOWN ? knows(text) : BY_HEART;
    if (loss > best + 0.05) return `The validation loss was lowest, ${best.toFixed(2)}, at step ${bestStep}: ${LATER}`;
    if (this.now.step - this.now.first !== knobs.max_iters) return HELD;
    return `Done: a loss of ${loss.toFixed(2)}. ${HELD}`;
  }
}

const EXPLODED = "It exploded: each step goes too far, past where the loss is low. Try a lower learning rate.";
const CHEATS =
  "This loss is a lie. Without the mask a token sees those after it, so the model copies the next token instead of " +
  "predicting it. When it writes, there is no next token to copy: what it writes is nonsense.";
const KNOWN = 0.1; // nats a character
const knows = (text) =>
  `It now knows this text by heart. Type its beginning, “${beginning(text.trim(), 8)}”, below, and press Continue.`;
const BY_HEART = "The text is short, so validation is on the text itself: how well it is known by heart.";
const LATER = "since then it learns what is special to its text, and holds for no other. A longer text helps.";
const HELD = "Validation is on the last tenth of the text, which it does not learn.";

const only = (knobs, keys) => Object.fromEntries(Object.entries(knobs).filter(([name]) => name in keys));

/** The settings in which a training differs from the present one. */
function differences(knobs, now) {
  const names = Object.keys(knobs).filter((name) => knobs[name] !== now[name]);
  return names.map((name) => `${KNOBS[name][0]} ${knobs[name]}`).join(", ") || "the same, earlier";
}

/** At most 150 points instead of many: the means of neighbours. */
function binnedMeans(points) {
  const size = Math.ceil(points.length / 150);
  return Array.from({ length: Math.ceil(points.length / size) || 0 }, (_, i) => {
    const part = points.slice(i * size, (i + 1) * size);
    return [part.at(-1)[0], meanOf(part.map(([, loss]) => loss))];
  });
}

/** {idea: [the changes of the first settings by which it is tried, what to expect]}. Figures: means of three seeds. */
const IDEAS = {
  "residual connections": [
    [{ block: "plain" }, { block: "pre_norm" }],
    "Without them each block replaces what it reads, and what a token was is soon lost: 2.73 without, 2.09 with.",
  ],
  norms: [
    [{ norm: "none" }, { norm: "layernorm" }],
    "With numbers of one scale every layer learns at the same pace: 2.45 without, 2.09 with.",
  ],
  "several heads": [
    [{ n_head: 1 }, { n_head: 4 }],
    "Little to see: one head reaches 2.13, four 2.09. So small a model has few things to look for.",
  ],
  positions: [
    [{ position: "none" }, { position: "learned" }, { position: "rotary" }],
    "None: 2.33. Learned ones are each seen too rarely in so few steps: 2.32. Rotary ones count distances: 2.09.",
  ],
  "the MLP": [
    [{ mlp: "none" }, { mlp: "plain" }],
    "Two thirds of the weights are in it: 2.36 without, 2.09 with.",
  ],
  "more layers": [
    [{ n_layer: 1 }, { n_layer: 2 }, { n_layer: 4 }],
    "2.11, 2.09, 2.10: a deeper model needs more text and more steps than these before it is better.",
  ],
  "another optimizer": [
    [{ optimizer: "adamw" }, { optimizer: "normuon" }],
    "AdamW reaches 2.09, NorMuon 2.07 in as many steps, each of which takes longer. Their rates were not tuned.",
  ],
  "break it: no mask": [
    [{ mask: "none" }],
    "Each token sees those after it, so also the one that it should predict.",
  ],
  "break it: a learning rate of 10": [
    [{ learning_rate: 10 }],
    "Each step jumps over the valley of the loss and lands higher on the other side.",
  ],
  "break it: 8 layers, no residual connections": [
    [{ n_layer: 8, block: "plain" }, { n_layer: 8, block: "pre_norm" }],
    "Through eight layers nothing of a token is left: the model learns only how frequent each character is, 3.09.",
  ],
};
const OF_SONNETS =
  " (Losses, the lower the better: means of three seeds, on the sonnets after 300 steps, with the other settings as at " +
  "first. Yours will differ a little.)";
const TRIED =
  "This trains new models instead of yours, with an idea and without it. If your text is too short to hold a part of it " +
  "out, they learn the sonnets.";
