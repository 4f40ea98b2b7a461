/* The panels, in the article's order, and last how the model came to be. Some are in attention.js and learning.js.

Each has id, title and intro; needs: keys of NEEDS; alone: true if it needs no text; build(app): its parts: elements,
and {root, update()}, which draws root for the text and the selection of now; also lists of parts, and nothing. */

/** Several parts as one, in an element of this class. */
function group(className, ...parts) {
  const present = parts.flat(Infinity).filter(Boolean);
  const root = h("div", { class: className }, present.map((part) => part.root ?? part));
  return { root, update: () => present.forEach((part) => part.update?.()) };
}
const controlRow = (...parts) => group("controls", parts);

/** An element that is drawn by f() at each update. */
function drawn(f, attributes = {}) {
  const root = h("div", { class: "drawn", ...attributes });
  const nodes = () => [f()].flat().filter(Boolean);
  const draw = () => root.replaceChildren(...nodes().map((node, i) => renewed(root.children[i], node)));
  return { root, update: () => keepFocus(root, draw) };
}

/** Replace a table by another one, within the same part that scrolls and that may have the focus. */
function renewed(old, fresh) {
  if (old === fresh || [old, fresh].some((node) => node?.className !== "captioned")) return fresh;
  const [scroll, filled] = [old.lastChild, fresh.lastChild];
  old.firstChild.replaceWith(fresh.firstChild);
  scroll.setAttribute("aria-label", filled.getAttribute("aria-label"));
  scroll.replaceChildren(...filled.children);
  return old;
}

/** An element that draw(answer, then) draws from the worker's answer to question(), or from null before there is one.

then: the app with the text and the selection that the question was about. While the model writes, answers come later
than tokens, and each is drawn with its own text. */
function answered(app, topic, question, draw) {
  let [answer, then] = [null, app];
  let [asked, drawnFor] = ["null", "null"];
  let waiting = false;
  const result = drawn(() => draw(answer, then));
  const take = (...taken) => {
    [answer, then, drawnFor] = taken;
    waiting = false;
    result.root.classList.remove("outdated");
    result.update();
  };
  const update = async () => {
    const now = question() || null;
    const text = JSON.stringify(now && [app.version, now]);
    const view = Object.assign(Object.create(app), { trace: app.trace, at: app.at });
    if (!now || text === drawnFor) {
      asked = text;
      return take(now && answer, view, text);
    }
    if (!answer) {
      then = view;
      result.update();
    }
    result.root.classList.add("outdated");
    if (text === asked || (waiting && app.going)) return; // a newer question would drop this one
    asked = text;
    waiting = true;
    const found = await app.desk.ask(topic, now);
    if (asked !== text) return;
    take(found, view, text);
  };
  return { root: result.root, update };
}

function sentence(f) {
  return drawn(() => h("p", {}, f()), { class: "text" });
}

/** Parts in rows: texts, and what they are about, which is beside them where there is room. */
function inRows(parts) {
  const rows = [];
  for (const part of parts.flat(Infinity).filter(Boolean)) {
    const isText = (part.root ?? part).matches("p, .text, .head-grid");
    if (!rows.length || (isText && rows.at(-1)[1].length)) rows.push([[], []]);
    rows.at(-1)[isText ? 0 : 1].push(part);
  }
  return rows.map(([texts, shown]) => group("row drawn", group("texts drawn", texts), group("drawn", shown)));
}

/** A strip of the selected token's row of the trace. Each cell opens its arithmetic.

pathOf(): null hides it. scale(): the number that its colours end at. from(): the first of `size` numbers. */
function rowStrip(app, label, pathOf, options = {}) {
  const { unit = "feature", token = () => app.at.t, scale = null, from = () => 0, size = Infinity } = options;
  const onSelect = (i) => app.open(`${pathOf()}:${token()},${from() + i}`);
  const strip = new Strip({ label, unit, onSelect });
  const update = () => {
    const path = pathOf();
    const row = path && lookUp(app.trace, path)?.[token()];
    strip.root.hidden = !row;
    if (!row) return;
    const common = scale && { max: scale(), note: `, length (L2) ${digits(Math.hypot(...row))}` };
    const selected = app.selectedIn(path, token()) - from();
    strip.show(Array.from(row).slice(from(), from() + size), { part: app.resolvePath(path), selected, ...common });
  };
  return { root: strip.root, update };
}

/** A strip of trained numbers, one for each feature. Each opens the number that is computed from it. */
function weightStrip(app, label, name, path) {
  const open = (i) => app.open(`${path()}.output:${app.at.t},${i}`);
  const strip = new Strip({ label: h("b", { class: "weight" }, label), onSelect: open });
  strip.canvas.setAttribute("aria-label", label);
  const update = () => {
    const selected = app.selectedIn(`${path()}.output`, app.at.t);
    strip.show(Array.from(lookUp(app.model.weights, path())[name].data), { selected });
  };
  return { root: strip.root, update };
}

/** A choice among n layers or heads. name: its key in the state. */
function numberPicker(app, label, name, n) {
  const options = Array.from({ length: n }, (_, i) => `${i + 1}`);
  const root = picker(label, options, app.at[name], (i) => app.select({ [name]: i, number: null }));
  return { root, update: () => root.set(app.at[name]) };
}
const layerPicker = (app) => numberPicker(app, "Layer", "layer", app.config.n_layer);
const headPicker = (app) => numberPicker(app, "Head", "head", app.config.n_head);

const count = (n) => n.toLocaleString("en");
const tokenName = (app, t, idx = app.trace.idx) => `“${shown(app.tokenizer, idx[t])}”`;
const ownBlock = (app) => `${app.stack}.blocks.${app.at.layer}`;
const blockPath = (app, rest) => `${ownBlock(app)}.${rest}`;

/** Whether the page can train by these settings of a run, which are null if its data is no text. */
const knowsRules = (training) => training?.optimizer in OPTIMIZERS && training.schedule in SCHEDULES;

/** What sections need: whether a run has it, why this one has not, and a config whose run has. */
const NEEDS = {
  stack: [
    (app) => app.stack,
    "This run is a window network: it has no attention, blocks or norms.",
    "humpty_dumpty.py",
  ],
  subwords: [
    (app) => !/^(char|byte)$/.test(app.tokenizer.name),
    "This run's tokens are single characters or bytes.",
    "article/02_subwords/2-subwords-same-text.py",
  ],
  mlp: [(app) => app.config.mlp !== "none", "This run's blocks have no MLP.", "article/04_residual/2-with.py"],
  norms: [(app) => app.config.norm !== "none", "This run has no norms.", "article/05_norm/2-with.py"],
  heads: [(app) => app.config.n_head > 1, "This run has one head.", "article/07_heads/2-four.py"],
  encoder: [(app) => app.encodes, "This run has no encoder and decoder.", "translate_de_en.py"],
  snapshots: [
    (app) => app.data.steps.length > 1 || app.playground.config,
    "This page has no earlier weights of its model.",
    "humpty_dumpty.py --snapshots=True",
  ],
  training: [
    (app) => app.config.model === "gpt" && knowsRules(app.data.training),
    "This page trains only models with model=gpt, on text, by the optimizers and schedules that HumptyGPT came with.",
    "humpty_dumpty.py",
  ],
};

// --------------------------------------------------------------------------------------
// Leaf or flower

function leafPanel() {
  const state = { x: [...LEAF], bias: false, relu: false, selected: ["hidden", 0] };
  const network = articleNetwork();
  const lines = svg("svg", { "aria-hidden": "true" });
  const columns = h("div", { class: "columns" });
  const drawing = h("div", { class: "network" }, lines, columns);
  const drawLines = () => lines.replaceChildren(...weightLines(columns, network, state.selected));
  new ResizeObserver(drawLines).observe(drawing);
  const colour = h("span", { class: "swatch", "aria-hidden": "true" });
  const sum = h("p", { class: "sum", "aria-live": "polite" });
  const verdict = h("strong");
  const select = (...neuron) => {
    state.selected = neuron;
    draw();
  };
  const draw = () => {
    const y = leafForward(network, state.x, state);
    keepFocus(columns, () => columns.replaceChildren(...networkColumns(y, state, select)));
    drawLines();
    sum.replaceChildren(...leafSum(network, y, state));
    colour.style.background = `rgb(${state.x.slice(0, 3).join()})`;
    const [leaf, flower] = y.output;
    const winner = leaf > flower ? [KINDS[0], leaf, ">", flower] : [KINDS[1], flower, "≥", leaf];
    verdict.textContent = `Output: ${winner[0]} wins, ${digits2(winner[1])} ${winner[2]} ${digits2(winner[3])}.`;
  };
  const sliders = INPUTS.map((name, i) => {
    const limits = name === "volume" ? { max: 100, step: 0.1 } : { max: 255, step: 1 };
    return slider(name, { min: 0, ...limits, value: state.x[i] }, (value) => ((state.x[i] = value), draw()));
  });
  const preset = (label, x) =>
    button(label, () => {
      state.x = [...x];
      sliders.forEach((control, i) => control.set(x[i]));
      draw();
    });
  const presets = [preset("A leaf", LEAF), preset("A sunflower", FLOWER)];
  const switches = ["bias", "relu"].map((name, i) =>
    toggle(["Bias", "ReLU"][i], false, (on) => ((state[name] = on), draw())),
  );
  draw();
  const controls = [controlRow(presets, switches, colour), group("controls wide", sliders)];
  return [...controls, { root: drawing, update: draw }, group("drawn", sum, verdict)];
}

function networkColumns({ x, sums, hidden, output }, { selected, relu }, onSelect) {
  const label = (name, value) => [h("span", { class: "note" }, name), h("span", {}, digits2(value))];
  const neuron = (layer, o, value, name) =>
    button(label(name, value), () => onSelect(layer, o), {
      class: "neuron",
      "aria-pressed": selected[0] === layer && selected[1] === o,
      style: tint(value, 50),
    });
  const columns = {
    Input: x.map((value, i) => h("div", { class: "neuron input" }, label(INPUTS[i], value))),
    Hidden: hidden.map((value, o) =>
      neuron("hidden", o, value, relu && sums[o] < 0 ? `${digits2(sums[o])} → 0` : `neuron ${o + 1}`),
    ),
    Output: output.map((value, o) => neuron("output", o, value, KINDS[o])),
  };
  return Object.entries(columns).map(([title, items]) =>
    h("div", { class: "column" }, h("h3", { class: "note" }, title), items),
  );
}

const digits2 = (x) => minus(x.toFixed(Math.abs(x) < 100 ? 2 : 1)).replace(/\.?0+$/, "");
const tint = (x, max) => `--tint: rgb(${colourOf(Math.max(Math.min(x / max, 1), -1) * 0.8).join()})`;

/** The selected neuron's sum, with every number in it; weights have their colours. */
function leafSum(network, y, { selected: [layer, o], bias, relu }) {
  const inputs = layer === "hidden" ? y.x : y.hidden;
  const { weight, bias: b } = network[layer];
  const trained = (w) => h("b", { class: "weight" }, digits2(w));
  const terms = weight[o].map((w, i) => [i ? " + (" : "(", `${digits2(inputs[i])} × `, trained(w), ")"]);
  if (bias) terms.push([" + ", trained(b[o]), " bias"]);
  const sum = (layer === "hidden" ? y.sums : y.output)[o];
  const after = layer === "hidden" && relu ? `; ReLU makes it ${digits2(y.hidden[o])}` : "";
  return [layer === "hidden" ? `Neuron ${o + 1}: ` : `${KINDS[o]}: `, ...terms.flat(), ` = ${digits2(sum)}${after}`];
}

/** The weights as lines: thick for large, dashed for negative, with numbers for the selected neuron. */
function weightLines({ children }, network, selected) {
  const neurons = [...children].map((column) => [...column.querySelectorAll(".neuron")]);
  const middle = (neuron) => neuron.offsetTop + neuron.offsetHeight / 2;
  return ["hidden", "output"].flatMap((layer, l) =>
    network[layer].weight.flatMap((row, o) => {
      const chosen = selected[0] === layer && selected[1] === o;
      return row.flatMap((w, i) => {
        const [from, to] = [neurons[l][i], neurons[l + 1][o]];
        const [x, y] = [from.offsetLeft + from.offsetWidth, middle(from)];
        const [dx, dy] = [to.offsetLeft - x, middle(to) - y];
        const look = { "stroke-width": 0.75 + 4 * Math.abs(w), "stroke-dasharray": w < 0 ? "5 3" : "none" };
        const line = svg("line", { x1: x, y1: y, x2: x + dx, y2: y + dy, opacity: chosen ? 1 : 0.3, ...look });
        return chosen && dx > 60 ? [line, svg("text", { x: x + 0.3 * dx, y: y + 0.3 * dy }, digits2(w))] : line;
      });
    }),
  );
}

const weightNames = (layer, inputs, outputs) =>
  outputs.flatMap((output, o) => inputs.map((input, i) => [`${input} → ${output}`, layer, o, i]));
const NEURONS = ["neuron 1", "neuron 2", "neuron 3"];
const WEIGHT_NAMES = [...weightNames("hidden", INPUTS, NEURONS), ...weightNames("output", NEURONS, KINDS)];
const NUDGE = 0.01;

class LeafTraining {
  constructor() {
    this.objects = leafObjects(80, 1);
    this.held = leafObjects(80, 2);
    this.rate = 0.5;
    this.weight = 0;
    this.chart = new Chart("loss of the leaf network after each step");
    this.status = h("p", { class: "status", role: "status" });
    this.nudge = h("p", {});
    this.pictures = new LeafPictures();
    this.go = button("Run", () => this.toggle());
    const limits = { min: -2, max: 3, step: 0.1, value: Math.log10(0.5), format: (x) => (10 ** x).toPrecision(2) };
    const rates = slider("Learning rate", limits, (x) => (this.rate = 10 ** x));
    const weights = picker("Weight", WEIGHT_NAMES.map(([name]) => name), 0, (i) => ((this.weight = i), this.update()));
    const buttons = [button("Step", () => this.step()), this.go, button("Start over", () => this.reset()), rates];
    const pictures = [this.chart, controlRow(weights), this.pictures, this.nudge];
    this.root = group("drawn", controlRow(buttons), this.status, pictures).root;
    darkScheme.addEventListener("change", () => this.update());
    this.reset();
  }

  reset() {
    this.stop();
    this.network = randomNetwork(LEAF_SEED);
    this.losses = [leafLoss(this.network, this.objects).loss];
    this.failed = false;
    this.update();
  }

  toggle() {
    if (this.running) return this.stop();
    this.go.textContent = "Stop";
    this.running = setInterval(() => {
      this.step();
      if (this.losses.length > 300) this.stop();
    }, 30);
  }

  stop() {
    clearInterval(this.running);
    this.running = null;
    this.go.textContent = "Run";
  }

  step() {
    if (this.failed) return;
    const next = leafStep(this.network, this.objects, this.rate);
    const { loss } = leafLoss(next, this.objects);
    if (!Number.isFinite(loss) || loss > 20 * this.losses[0]) {
      this.failed = true;
      this.stop();
    } else {
      this.network = next;
      this.losses.push(loss);
    }
    this.update();
  }

  update() {
    const { loss } = leafLoss(this.network, this.objects);
    const { accuracy } = leafLoss(this.network, this.held);
    this.root.dataset.accuracy = accuracy;
    const steps = this.losses.length - 1;
    this.status.textContent = this.failed
      ? `Exploded after step ${steps}: with a rate of ${this.rate.toPrecision(2)} each step jumps over the ` +
        `valley and lands higher. Start over with a smaller rate.`
      : `Step ${steps}: loss ${loss.toFixed(4)}, ${Math.round(100 * accuracy)} % of 80 other objects right.`;
    const line = { name: "training loss", points: this.losses.map((y, x) => [x, y]), colour: 0 };
    this.chart.show([line], { name: "guessing: −ln ½", y: Math.LN2 });
    const another = WEIGHT_NAMES[(this.weight + 1) % WEIGHT_NAMES.length];
    this.pictures.show(this.network, this.objects, [WEIGHT_NAMES[this.weight], another]);
    const [name, layer, o, i] = WEIGHT_NAMES[this.weight];
    const moved = structuredClone(this.network);
    moved[layer].weight[o][i] += NUDGE;
    const difference = (leafLoss(moved, this.objects).loss - loss) / NUDGE;
    const derivative = leafGradient(this.network, this.objects)[layer].weight[o][i];
    this.nudge.textContent =
      `${name} is ${digits(this.network[layer].weight[o][i])}. Raised by ${NUDGE}, it ` +
      `changes the loss by ${minus((difference * NUDGE).toPrecision(2))}: ${digits(difference)} for each unit. By ` +
      `the chain rule its derivative is ${digits(derivative)}. A step of gradient descent moves it by ` +
      `${minus((-this.rate * derivative).toPrecision(2))}: minus the learning rate times this derivative.`;
  }
}

const RUN_LOSS =
  "Your model learned in the same way. Its right answers are the tokens, characters or parts of words, that come " +
  "next in a text. Its loss is in nats, as ln is the natural logarithm; the validation loss is of text that is new " +
  "to it.";

/** The losses of metrics.jsonl, if the run has them. */
function runLoss(app) {
  const none = "The run's folder had no metrics.jsonl, so there is no curve to draw.";
  if (!app.data.metrics.length) return h("p", { class: "quiet" }, none);
  const chart = new Chart("training and validation loss of this run");
  const V = app.model.tokenizer_vocab_size;
  const level = { name: `guessing: −ln 1/${V} = ${Math.log(V).toFixed(2)}`, y: Math.log(V) };
  const update = () => {
    const { metrics } = app.data;
    const points = (key) => metrics.filter((row) => row[key] !== undefined).map((row) => [row.iter, row[key]]);
    const lines = [
      { name: "training loss", points: points("train_loss"), colour: 0 },
      { name: "validation loss", points: points("val_loss"), colour: 1 },
    ];
    chart.show(lines.filter(({ points }) => points.length), level);
  };
  return [h("p", {}, RUN_LOSS), { root: chart.root, update }];
}

// --------------------------------------------------------------------------------------
// Writing

function writingPanel(app) {
  return [
    sentence(() => {
      const { greedy, temperature } = app.state.sampling;
      if (greedy) return "Greedy: the most probable token is appended. It soon repeats itself.";
      return (
        `A token is drawn at random, each with its probability at temperature ${temperature}. The section on softmax ` +
        `explains the temperature, and filters that leave out unlikely tokens.`
      );
    }),
    sentence(() => windowText(app)),
    drawn(() => table("The context's last tokens", ["position", "token", "number: id"], contextRows(app), [0, 2])),
    !app.stack && [
      h("h3", {}, "The window network"),
      rowStrip(app, "window: its input", () => "window", { unit: "input" }),
      Array.from({ length: app.config.n_layer }, (_, i) => [
        rowStrip(app, `layer ${i + 1}, before activation`, () => `layers.${i}.linear`, { unit: "neuron" }),
        rowStrip(app, `layer ${i + 1}, neurons`, () => `layers.${i}.activation`, { unit: "neuron" }),
      ]),
    ],
  ];
}

function windowText(app) {
  const { idx } = app.trace;
  const { block_size, window, model } = app.config;
  const left = app.translates ? 0 : app.read.ids.length - idx.length;
  const reach = model === "window_mlp" ? ` Of these the network sees the last ${window}.` : "";
  const lost = left
    ? ` ${tokens(left)} before them left it when it was full, where its newest half is kept: the model knows nothing ` +
      `of them.`
    : "";
  return (
    `The model's context, all that it can read, has room for ${tokens(block_size)}; ${count(idx.length)} ` +
    `${idx.length === 1 ? "is" : "are"} in it.${reach}${lost} The numbers of a new token are computed; those of the ` +
    `tokens before it stay as they are.`
  );
}

function contextRows(app) {
  const { idx } = app.trace;
  const first = Math.max(idx.length - 12, 0);
  return idx.slice(first).map((id, i) => [`${first + i}`, h("code", {}, shown(app.tokenizer, id)), `${id}`]);
}

// --------------------------------------------------------------------------------------
// Embeddings and sub-words

const NEIGHBOURS = 8;
const NEAREST = "Nearest neighbours of its vector, by cosine: 1 has its direction, 0 is unrelated";

function embeddingsPanel(app) {
  const single = "In this run a token is a single number, so no two tokens are alike.";
  return [
    sentence(
      () =>
        `The token at position ${app.at.t} (from 0), ${tokenName(app, app.at.t)}, has the id ` +
        `${app.trace.idx[app.at.t]} of ${count(app.model.tokenizer_vocab_size)}; to the model it is these ` +
        `${app.config.n_embd} features.`,
    ),
    rowStrip(app, "token embedding", () => "wte"),
    app.config.embedding === "number"
      ? missingNote(single, "article/01_embeddings/2-embedding.py")
      : drawn(() => table(NEAREST, ["token", "cosine"], neighbours(app), [1])),
  ];
}

function neighbours(app) {
  const { data, shape } = app.model.weights.wte.weight;
  const own = app.trace.wte[app.at.t];
  const length = Math.sqrt(dot(own, own));
  const cosines = Float64Array.from({ length: app.model.tokenizer_vocab_size }, (_, id) => {
    const row = data.subarray(id * shape[1], (id + 1) * shape[1]);
    return dot(own, row) / (length * Math.sqrt(dot(row, row)) || 1);
  });
  cosines[app.trace.idx[app.at.t]] = -2; // leave out the token itself
  return likeliest(cosines, NEIGHBOURS).map((id) => [h("code", {}, shown(app.tokenizer, id)), digits(cosines[id])]);
}

const MERGES_SHOWN = 40;

function subwordsPanel(app) {
  return [h("p", {}, SUBWORDS[app.tokenizer.name]), drawn(() => mergeTable(app))];
}

const MERGED =
  "Of the neighbours that together are a token, those that became one first (the lowest rank) are merged first.";
const BYTES = "What is no token is spelled in bytes.";
const SUBWORDS = {
  sentencepiece: `A word starts as characters, ▁ for a space. ${MERGED} ${BYTES}`,
  bpe: `A word starts as bytes. ${MERGED}`,
  gpt2: `A word starts as bytes. ${MERGED}`,
};

/** The parts of the text, or of the source if nothing is translated yet, and the index of the selected token. */
function selectedToken(app) {
  const { text: typed, source } = app.read;
  if (app.translates && !typed) return { text: source, token: app.at.key };
  const text = app.tokenizer.eot === null ? typed : typed.replace(/^<\|endoftext\|>/, "");
  return { text, token: app.at.t - (app.trace.idx.length - app.tokenizer.encode(text).length) };
}

/** The steps by which the part of the text around the selected token became tokens. */
function mergeTable(app) {
  const { text, token } = selectedToken(app);
  let end = 0;
  const part = app.tokenizer.split(text).find(({ tokens }) => {
    end += tokens.reduce((sum, { ids }) => sum + ids.length, 0);
    return token >= 0 && token < end;
  });
  if (!part) return h("p", { class: "quiet" }, "Type a word, and select one of its tokens.");
  const more = part.merges.length - MERGES_SHOWN;
  const caption = "The part of the text that the selected token is in, merge by merge";
  return [
    table(caption, ["step", "symbols", "rank"], mergeRows(part), [2]),
    more > 0 && h("p", { class: "quiet" }, `${more} more merges.`),
  ];
}

const piece = (text) =>
  signs(text).replace(/[\u0000-\u001f\u0080-\u00a0]/g, (byte) => `\\${hexadecimal(byte.charCodeAt(0))}`);

function mergeRows({ symbols, merges, tokens }) {
  const line = (texts, chosen = -1) => {
    const symbol = (text, i) => h("span", { class: i === chosen ? "merged" : null }, text);
    return h("code", { class: "symbols" }, texts.map(symbol));
  };
  const rows = [["start", line(symbols.map(piece)), ""]];
  const now = [...symbols];
  merges.slice(0, MERGES_SHOWN).forEach(({ at, piece: made, rank }, i) => {
    now.splice(at, 2, made);
    rows.push([`${i + 1}`, line(now.map(piece), at), minus(+rank.toFixed(2))]);
  });
  rows.push(["tokens", line(tokens.map((token) => `${piece(token.piece)} ${token.ids.join(" ")}`)), ""]);
  return rows;
}

// --------------------------------------------------------------------------------------
// Softmax and sampling

/** Filter as sample.py does: temperature, top-k with ties, softmax, top-p, min-p, rescaling; or greedy. Returns logits
and probs after each step. */
function filtered(logits, V, { temperature, top_k, top_p, min_p, greedy }) {
  const scaled = Array.from(logits.subarray(0, V), (x) => x / Math.max(temperature, 1e-30));
  const least = top_k && top_k < V ? Float64Array.from(scaled).sort()[V - top_k] : -Infinity;
  const kept = scaled.map((x) => (x < least ? -Infinity : x));
  let probs = Array.from(softmax(kept));
  if (top_p < 1) {
    const ranked = Float64Array.from(probs).sort().reverse();
    let [before, smallest] = [0, 1];
    for (const p of ranked) {
      if (before >= top_p) break;
      [smallest, before] = [p, before + p];
    }
    probs = probs.map((p) => (p < smallest ? 0 : p));
  }
  const most = probs.reduce((a, b) => Math.max(a, b), 0);
  probs = probs.map((p) => (p < min_p * most ? 0 : p));
  const [best] = likeliest(logits.subarray(0, V), 1);
  if (greedy) probs = probs.map((_, id) => (id === best ? 1 : 0));
  const sum = probs.reduce((a, b) => a + b, 0);
  return { scaled, probs: probs.map((p) => p / sum) };
}

function softmaxPanel(app) {
  const drawnToken = h("p", { class: "status", role: "status" });
  const draw = () => {
    const uniform = Math.random();
    const { probs } = filtered(app.logits(), app.model.tokenizer_vocab_size, app.state.sampling);
    const id = drawFrom(probs, uniform);
    drawnToken.textContent =
      `A random number, ${uniform.toFixed(4)}, falls into “${shown(app.tokenizer, id)}”, ` +
      `whose probability is ${percent(probs[id])}.`;
  };
  const set = (name) => (value) => app.change({ sampling: { ...app.state.sampling, [name]: value } });
  const control = (label, name, step, most = LIMITS[name][1]) => {
    const format = (x) => (x === OFF[name] && name !== "temperature" ? "off" : `${x}`);
    const root = slider(label, { min: LIMITS[name][0], max: most, step, value: OFF[name], format }, set(name));
    return { root, update: () => root.set(app.state.sampling[name]) };
  };
  const heads = ["token", "logit", "exp", "probability", "logit / temperature", "drawn with probability"];
  return [
    sentence(() => softmaxText(app)),
    drawn(() => table("The most probable tokens", heads, softmaxRows(app), [1, 2, 3, 4, 5])),
    h("p", {}, FILTERS),
    group(
      "controls wide",
      control("Temperature", "temperature", 0.1),
      control("Top-k", "top_k", 1, Math.min(app.model.tokenizer_vocab_size, LIMITS.top_k[1])),
      control("Top-p", "top_p", 0.05),
      control("Min-p", "min_p", 0.01),
    ),
    controlRow(button("Draw a token", draw), drawnToken),
  ];
}

const FILTERS =
  "Logits are divided by the temperature: below 1 the likely become likelier. Top-k keeps only the k likeliest " +
  "tokens. Top-p keeps the fewest of the likeliest whose probabilities add up to p. Min-p keeps the tokens that are " +
  "at least min-p times as probable as the likeliest one.";

function softmaxText(app) {
  const logits = app.logits().subarray(0, app.model.tokenizer_vocab_size);
  const { largest, sum } = sumOfExp(logits);
  return (
    `The largest of ${logits.length} logits is ${digits(largest)}; it is subtracted first, which leaves the result ` +
    `the same and avoids overflow. The sum of all exp(logit − ${digits(largest)}) is ${digits(sum)}.${rounded(app)}`
  );
}

function softmaxRows(app) {
  const { scaled, probs } = filtered(app.logits(), app.model.tokenizer_vocab_size, app.state.sampling);
  const logits = app.logits();
  const { largest } = sumOfExp(logits.subarray(0, app.model.tokenizer_vocab_size));
  return likeliest(app.probs(), 10).map((id) => [
    h("code", {}, shown(app.tokenizer, id)),
    button(digits(logits[id]), () => app.open(`logits:${app.at.t},${id}`), { class: "operand" }),
    digits(Math.exp(logits[id] - largest)),
    percent(app.probs()[id]),
    digits(scaled[id]),
    probs[id] ? percent(probs[id]) : "dropped",
  ]);
}

// --------------------------------------------------------------------------------------
// Residual stream, MLP, norm, dropout

function residualPanel(app) {
  const off = new Set();
  const result = switchedOff(app, off);
  const input = () => blockPath(app, "input");
  const branches = Object.entries(BRANCH_NAMES).map(([branch, name]) => {
    const path = (rest) => () => (branchesOf(app.trace, ownBlock(app)).includes(branch) ? blockPath(app, rest) : null);
    return { name, adds: path(BRANCH_OUTPUT[branch]), after: path(`after_${branch}`) };
  });
  const paths = () => [input, ...branches.flatMap(({ adds, after }) => [adds, after])].map((path) => path());
  const scale = () => Math.max(...paths().map((path) => (path ? largest(lookUp(app.trace, path)[app.at.t]) : 0)));
  const plain = "In this run each branch replaces its input: there is no residual stream, and nothing to add up.";
  return [
    controlRow(layerPicker(app)),
    rowStrip(app, "enters the block", input, { scale }),
    branches.map(({ name, adds, after }) => [
      rowStrip(app, `${name} adds`, adds, { scale }),
      rowStrip(app, `after ${name}`, after, { scale }),
    ]),
    app.config.block === "plain" && missingNote(plain, "article/04_residual/2-with.py"),
    drawn(() => contributionList(app)),
    h("h3", {}, "Switch branches off"),
    branchSwitches(app, off, result),
    result,
  ];
}

function contributionList(app) {
  const { t, next } = app.at;
  const list = contributions(app.model, app.trace, app.stack, t, next);
  const sum = addUp(list);
  const most = largest(list.map(({ value }) => value));
  const rows = list.map(({ name, layer, value }) => {
    const width = (50 * Math.abs(value)) / most;
    const style = `${value < 0 ? "right" : "left"}: 50%; width: ${width}%; ${tint(value, 1e-9)}`;
    const title = h("span", {}, layer === undefined ? name : `layer ${layer + 1} ${name}`);
    const bar = h("span", { class: "balance" }, h("span", { style }));
    return h("li", { "data-value": value }, title, h("span", { class: "number" }, signed(value)), bar);
  });
  const cap = app.config.logit_soft_cap ? ", before its soft cap" : "";
  const held = { layernorm: "'s mean and deviation are", rmsnorm: "'s root mean square is" }[app.config.norm];
  const text =
    `Together ${digits(sum)}: the logit${cap} less the mean over all tokens, since softmax ignores what all logits ` +
    `share.${held ? ` The final norm${held} held (see Norm).` : ""} Another next token can be chosen at its bar.`;
  return [
    h("h3", {}, `What each part adds to the logit of “${shown(app.tokenizer, next)}”${cap}, above the mean of all`),
    h("ol", { class: "contributions", "data-sum": sum }, rows),
    h("p", {}, text),
  ];
}

function branchSwitches(app, off, result) {
  const boxes = (_, i) =>
    branchesOf(app.trace, `${app.stack}.blocks.${i}`).map((branch) => {
      const name = `${app.stack}.blocks.${i}.${branch === "cross" ? "cross_attn" : branch}`;
      return toggle(`${i + 1} ${BRANCH_NAMES[branch]}`, true, (on) => {
        off[on ? "delete" : "add"](name);
        result.update();
      });
    });
  return controlRow(Array.from({ length: app.config.n_layer }, boxes));
}

function switchedOff(app, off) {
  const question = () => off.size && { names: [...off], ...untilSelected(app) };
  return answered(app, "off", question, (answer, then) => {
    if (!answer) return h("p", { class: "quiet" }, "All branches are on.");
    const caption = "Next token with all branches, and with what is left";
    return comparison(app, caption, ["all", "left"], [then.probs(), answer.probs]);
  });
}

/** A question to the worker about the tokens up to the selected one. */
function untilSelected(app) {
  return { idx: app.trace.idx.slice(0, app.at.t + 1), source: app.source ?? null };
}

/** The most probable tokens by several predictions, side by side. */
function comparison(app, caption, heads, predictions) {
  const ids = new Set(predictions.flatMap((probs) => likeliest(probs, predictions.length > 2 ? 3 : 5)));
  const rows = [...ids]
    .slice(0, 10)
    .map((id) => [h("code", {}, shown(app.tokenizer, id)), ...predictions.map((probs) => percent(probs[id]))]);
  return table(caption, ["token", ...heads], rows, heads.map((_, i) => i + 1));
}

function mlpPanel(app) {
  const { mlp, mlp_conv, activation } = app.config;
  const path = (rest) => () => blockPath(app, `feed_forward.${rest}`);
  const neurons = { unit: "neuron" };
  const gated = mlp === "gated";
  const squashed = { relu: "ReLU", relu_squared: "ReLU squared" }[activation] ?? `${activation}, a smooth ReLU`;
  const reach = mlp_conv === 1 ? "the token before" : `the ${mlp_conv} tokens before`;
  const convolution =
    `Not quite by itself in this run: by a short convolution each feature first takes a share of the same feature of ` +
    `${reach}.`;
  return [
    controlRow(layerPicker(app)),
    rowStrip(app, "what it reads", path("input")),
    mlp_conv && [h("p", {}, convolution), rowStrip(app, "after the convolution", path("conv"))],
    gated && rowStrip(app, "gates, before activation", path("gate_proj"), neurons),
    rowStrip(app, gated ? "values" : "neurons, before activation", path("up_proj"), neurons),
    h("p", {}, `Then each neuron's ${gated ? "gate" : "sum"} goes through the activation function, ${squashed}:`),
    rowStrip(app, gated ? "gates" : "neurons", path("activation"), neurons),
    gated && rowStrip(app, "gate times value", path("hidden"), neurons),
    rowStrip(app, "what the MLP adds to the stream", path("down_proj")),
    drawn(() => table("The strongest neurons", ["neuron", "activation"], strongestNeurons(app), [1])),
  ];
}

function strongestNeurons(app) {
  const path = blockPath(app, "feed_forward.hidden");
  const row = lookUp(app.trace, path)[app.at.t];
  return likeliest(row.map(Math.abs), Math.min(6, row.length)).map((i) => [
    button(`${i}`, () => app.open(`${path}:${app.at.t},${i}`), { class: "operand" }),
    digits(row[i]),
  ]);
}

function normPanel(app) {
  const norms = ["attn_norm", "cross_norm", "mlp_norm"].filter((name) =>
    lookUp(app.trace, `${app.stack}.blocks.0.${name}`),
  );
  let chosen = 0;
  const where = app.config.block === "post_norm" ? "after" : "before";
  const path = () => blockPath(app, norms[chosen]);
  const parts = [
    rowStrip(app, "before", () => `${path()}.input`),
    sentence(() => normText(app, path())),
    weightStrip(app, "trained gain: a factor for each feature", "weight", path),
    app.config.bias && app.config.norm === "layernorm" && weightStrip(app, "trained bias", "bias", path),
    rowStrip(app, "after", () => `${path()}.output`),
  ].filter(Boolean);
  const names = norms.map((name) => `${where} ${BRANCH_NAMES[name.replace("_norm", "")]}`);
  const root = picker("Norm", names, 0, (i) => {
    chosen = i;
    parts.forEach((part) => part.update());
  });
  let followed = null;
  const follow = () => {
    const path = app.at.number && app.resolvePath(parseAddress(app.at.number).path); // the norm that made the number
    const of = norms.findIndex((name) => path?.includes(`.${name}.`));
    if (of >= 0 && followed !== app.at.number) root.set((chosen = of));
    followed = app.at.number;
  };
  return [controlRow(layerPicker(app), { root, update: follow }), parts];
}

function normText(app, path) {
  const { t } = app.at;
  const norm = lookUp(app.trace, path);
  const link = (name) => button(digits(norm[name][t]), () => app.open(`${path}.${name}:${t}`), { class: "operand" });
  const rms = ": each feature is divided by it and multiplied by its trained gain. RMSNorm subtracts no mean.";
  if (!norm.mean) return ["Root mean square ", link("rms"), rms];
  const std =
    ": from each feature the mean is subtracted, then it is divided by the deviation and multiplied by its trained " +
    `gain${app.config.bias ? " and given its bias" : ""}.`;
  return ["Mean ", link("mean"), ", standard deviation ", link("std"), std];
}

const THINNED = 5;

function dropoutPanel(app) {
  const trained = app.config.dropout;
  const state = { p: trained || 0.1, seed: 0, drawnFor: null };
  const question = () => {
    const asked = untilSelected(app);
    if (state.drawnFor !== JSON.stringify(asked)) return null;
    return { ...asked, p: state.p, seeds: Array.from({ length: THINNED }, (_, i) => state.seed + i) };
  };
  const results = answered(app, "thinned", question, (answer, then) => {
    if (!answer) return h("p", { class: "quiet" }, "Draw thinned networks to see what each of them predicts.");
    const { results } = answer;
    const mean = results[0].map((_, id) => results.reduce((sum, probs) => sum + probs[id], 0) / THINNED);
    const caption = `Next token by ${THINNED} thinned networks, by their mean, and by the whole network`;
    const heads = [...results.map((_, i) => `${i + 1}`), "mean", "whole"];
    return comparison(app, caption, heads, [...results, mean, then.probs()]);
  });
  const draw = () => {
    state.seed += THINNED;
    state.drawnFor = JSON.stringify(untilSelected(app));
    results.update();
  };
  const rate = slider("Probability", { min: 0.05, max: 0.5, step: 0.05, value: state.p }, (p) => (state.p = p));
  const without = "This run was trained without dropout. Thinned, a network that was never trained so predicts worse.";
  const note = trained
    ? h("p", {}, `This run was trained with dropout ${trained}.`)
    : missingNote(without, "article/06_dropout/2-with.py");
  return [note, controlRow(rate, button("Draw thinned networks", draw)), results];
}

// --------------------------------------------------------------------------------------
// Positions

function positionsPanel(app) {
  const scheme = app.config.position;
  const none = "This run has no positional encoding. Beside the config below are others, with sinusoids and rotations.";
  return [
    scheme === "none" ? missingNote(none, "article/08_positions/2-learned.py") : h("p", {}, POSITION_TEXTS[scheme]),
    POSITION_PARTS[scheme]?.(app),
    h("h3", {}, "Swap two tokens"),
    swapTokens(app),
  ];
}

const POSITION_TEXTS = {
  learned: "Each position has a trained vector, which is added to the token's.",
  sinusoidal: "Each position has a fixed vector of sinusoids, fast ones first, which is added to the token's.",
  rotary:
    "Each pair of features of a query or key is rotated by an angle that grows with its position: in their " +
    "product the position counts only through the distance. Each dial is a pair; its hand points to the angle " +
    "between query and key.",
  alibi: "Each head lowers a score by its slope times the distance.",
};

function positionHeat(app) {
  const path = `${app.stack}.position.vectors`;
  const heat = new Strip({
    label: "all positions, one a row",
    square: 5,
    columns: app.config.n_embd,
    describe: (i) => `position ${Math.floor(i / app.config.n_embd)}, feature ${i % app.config.n_embd}`,
    onSelect: (i) => app.open(`${path}:${Math.floor(i / app.config.n_embd)},${i % app.config.n_embd}`),
  });
  const update = () => {
    const i = app.selectedIn(path, app.at.t);
    const selected = i < 0 ? -1 : app.at.t * app.config.n_embd + i;
    heat.show(lookUp(app.trace, path).flatMap((row) => [...row]), { selected });
  };
  return [rowStrip(app, "vector of this position", () => path), { root: heat.root, update }];
}

function dials(app) {
  let distance = 5; // at this distance the first dials have turned, and the last ones hardly
  const hands = h("div", { role: "img", class: "dials" });
  const text = h("p", {});
  const limits = { min: 0, max: app.config.block_size - 1, step: 1, value: distance };
  const control = slider("Distance", limits, (d) => {
    distance = d;
    update();
  });
  const update = () => {
    const { t } = app.at;
    const apart = Math.min(distance, t);
    control.set(apart, Math.max(t, 1));
    const { frequency } = lookUp(app.trace, app.stack).position;
    const angles = Array.from(frequency, (f) => f * apart);
    text.textContent =
      `Query ${t}, key ${t - apart}: ${counted(apart, "position")} apart. The first pair is rotated by ` +
      `${digits(angles[0])} radians, the last by ${digits(angles.at(-1))}.`;
    hands.setAttribute("aria-label", text.textContent);
    hands.replaceChildren(...angles.map((angle) => h("span", { style: `rotate: ${-angle}rad` })));
  };
  const both = ["q", "k"].map((name) =>
    rowStrip(app, `${name === "q" ? "query" : "key"}, rotated`, () => blockPath(app, `attn.${name}`)),
  );
  return [controlRow(control), group("drawn", { root: hands, update }, text), both];
}

function slopes(app) {
  const rows = () =>
    Array.from(lookUp(app.trace, app.stack).position.slopes, (slope, i) => [
      `${i + 1}`,
      digits(slope),
      digits(-slope * Math.max(app.at.t - app.at.key, 0)),
    ]);
  return drawn(() => table("Slopes", ["head", "slope", "at this distance"], rows(), [0, 1, 2]));
}

const POSITION_PARTS = { learned: positionHeat, sinusoidal: positionHeat, rotary: dials, alibi: slopes };

/** The prediction with the selected token and the one before it swapped. */
function swapTokens(app) {
  const place = ({ at, trace }) => Math.min(at.t, trace.idx.length - 2);
  const question = () => {
    const idx = [...app.trace.idx];
    const t = place(app);
    if (t < 1 || idx[t] === idx[t - 1]) return null;
    [idx[t - 1], idx[t]] = [idx[t], idx[t - 1]];
    return { idx, source: app.source ?? null };
  };
  return answered(app, "other", question, (answer, then) => {
    const t = place(then);
    if (!answer)
      return h("p", { class: "quiet" }, "Select a token that differs from the one before it, with one after it.");
    const last = then.trace.idx.length - 1;
    then.ensureLogits(last);
    const names = [t - 1, t].map((i) => `${i} ${tokenName(then, i)}`).join(" and ");
    const caption = `Next token after the text, and after the same with tokens ${names} swapped`;
    return comparison(app, caption, ["as typed", "swapped"], [then.trace.probs[last], answer.probs]);
  });
}

// --------------------------------------------------------------------------------------
// The whole models

function gptPanel(app) {
  const branches = branchesOf(app.trace, ownBlock(app)).map((branch) => BRANCH_NAMES[branch]);
  const text =
    `The embedding; ${counted(app.config.n_layer, "layer")}, each a block of ${branches.join(" and ")}; ` +
    `${app.config.block === "post_norm" ? "" : "a final norm; "}and the output head, whose sums are the logits. A ` +
    `row of the table is what the model would predict if the stream ended after this part: the logit lens.`;
  return [
    h("p", {}, text),
    drawn(() => lensTable(app)),
    controlRow(layerPicker(app)),
    rowStrip(app, "stream after this layer", () => blockPath(app, "output")),
    rowStrip(app, "what the output head reads", () => "output"),
    rowStrip(app, "logits", () => "logits", { unit: "id" }),
  ];
}

function lensTable(app) {
  const V = app.model.tokenizer_vocab_size;
  const guess = (probs, id) => {
    const attributes = { class: "lens", style: tint(probs[id], 1) };
    return h("span", attributes, h("code", {}, shown(app.tokenizer, id)), ` ${percent(probs[id])}`);
  };
  const rows = logitLens(app.model, app.trace, app.stack, app.at.t).map(({ label, logits }) => {
    const probs = probabilities(app.model, logits);
    const best = likeliest(probs, Math.min(4, V));
    return [label, ...best.map((id) => guess(probs, id)), percent(probs[app.at.next])];
  });
  const heads = ["after", "1st", "2nd", "3rd", "4th", `“${shown(app.tokenizer, app.at.next)}”`];
  return table(`Logit lens for the token after ${tokenName(app, app.at.t)}`, heads, rows, [5]);
}

function transformerPanel(app) {
  const sourceRow = (label, rest) =>
    rowStrip(app, label, () => `source.encoder.blocks.${app.at.layer}.${rest}`, {
      token: () => Math.min(app.at.key, app.source.length - 1),
    });
  const alignmentLabel = "alignment: each row is a token of the translation, each column one of the source";
  const encoderLabel = "encoder: each row is a source token, and attends to all";
  return [
    sentence(
      () =>
        `The encoder has read the ${app.source.length} tokens of the source once; each token of it attends to ` +
        `all. The decoder writes step by step: token ${app.at.t}, ${tokenName(app, app.at.t)}, attends to the ` +
        `tokens before it and, in cross-attention, to the source.`,
    ),
    headGrid(app, "cross_attn"),
    controlRow(layerPicker(app), headPicker(app)),
    alignment(app),
    attentionMatrix(app, "cross_attn", { label: alignmentLabel }),
    drawn(() => alignmentTable(app)),
    attentionMatrix(app, "attn", { label: encoderLabel, encoder: true }),
    sourceRow("encoder, this layer: the selected source token", "output"),
    rowStrip(app, "decoder: what cross-attention adds", () => blockPath(app, "cross_attn.o_proj")),
  ];
}

function alignmentTable(app) {
  const { weights } = lookUp(app.trace, blockPath(app, "cross_attn"));
  const rows = weights[app.at.head].map((row, t) => {
    const [best] = likeliest(row, 1);
    const token = (id) => h("code", {}, shown(app.tokenizer, id));
    return [token(app.trace.idx[t]), token(app.source[best]), percent(row[best])];
  });
  return table("The source token that this head attends to most", ["translation", "source", "weight"], rows, [2]);
}

const PANELS = [
  {
    id: "leaf",
    alone: true,
    title: "A toy first: leaf or flower",
    short: "Toy",
    chapter: "A simple neural network",
    build: leafPanel,
    intro:
      "Not your model yet: this is the network that the article “Understanding LLMs from Scratch Using Middle School " +
      "Math” begins with. It tells leaves from flowers by four numbers, and can be seen whole; your model consists " +
      "of the same sums, only of many more. A neuron is the sum of the numbers in the layer before it, each times " +
      "the weight on its line: select one. Bias adds a number to each sum. ReLU makes negative sums in the middle 0.",
  },
  {
    id: "training",
    alone: true,
    title: "Training",
    chapter: "How are these models trained?",
    build: (app) => [new LeafTraining().root, runLoss(app)],
    intro:
      "How the toy gets its weights. Its loss is how wrong it is: −ln of the probability of the right answer, on " +
      "average (a section below is about softmax, which makes the probabilities). Gradient descent changes each " +
      "weight a little, in the direction in which the loss falls.",
  },
  {
    id: "writing",
    title: "Writing",
    chapter: "How does all this help generate language?",
    build: writingPanel,
    intro: "From here on, your model. It predicts the next token, appends it to the text, and predicts again.",
  },
  {
    id: "embeddings",
    title: "Embeddings",
    chapter: "Embeddings",
    build: embeddingsPanel,
    intro: "To the model a token is a list of numbers: its embedding, a vector of features, trained with the rest.",
  },
  {
    id: "subwords",
    title: "Sub-words",
    build: subwordsPanel,
    needs: ["subwords"],
    intro: "Frequent sequences of characters are tokens of their own.",
  },
  {
    id: "attention",
    title: "Self-attention",
    short: "Attention",
    chapter: "Self Attention",
    build: attentionPanel,
    needs: ["stack"],
    intro:
      "Each token makes three vectors by projections, which are sums with trained weights: a query, what it looks " +
      "for; a key, what it has; a value, what it passes on. A query is multiplied with the key of each token up to " +
      "its own. By softmax, the next section, these scores become weights that add up to 1, by which the values are " +
      "mixed. A model does this in each of its layers, one after the other, and in one or more heads at once.",
  },
  {
    id: "softmax",
    title: "Softmax",
    chapter: "Softmax",
    build: softmaxPanel,
    intro:
      "At the end each token that the model knows has a score, its logit. It becomes a probability: exp(logit), " +
      "divided by the sum of all of these. Then one token is drawn.",
  },
  {
    id: "residual",
    title: "Residual connections",
    short: "Residual",
    chapter: "Residual connections",
    build: residualPanel,
    needs: ["stack"],
    intro:
      "Here a layer is a block of branches: attention, and a small network, the MLP of the next section. Each adds " +
      "its output to the residual stream, the vector of a token on its way through the model.",
  },
  {
    id: "mlp",
    title: "The MLP",
    short: "MLP",
    build: mlpPanel,
    needs: ["stack", "mlp"],
    intro:
      "In each layer, after attention has gathered, a small network like the toy, a multi-layer perceptron (MLP), " +
      "works on each token by itself.",
  },
  {
    id: "norm",
    title: "Layer normalization",
    short: "Norm",
    chapter: "Layer Normalization",
    build: normPanel,
    needs: ["stack", "norms"],
    intro: "Before a branch reads the stream, its features are brought to one scale.",
  },
  {
    id: "dropout",
    title: "Dropout",
    chapter: "Dropout",
    build: dropoutPanel,
    intro: "In training each activation is zeroed with a probability, so each step trains another, thinned network.",
  },
  {
    id: "heads",
    title: "Multi-head attention",
    short: "Heads",
    chapter: "Multi-head Attention",
    build: headsPanel,
    needs: ["stack", "heads"],
    intro: "Several heads attend at once, each to something else.",
  },
  {
    id: "positions",
    title: "Positions",
    chapter: "Positional encoding and embedding",
    build: positionsPanel,
    needs: ["stack"],
    intro: "But for its causal mask, which hides later tokens, attention alone does not see the order of the tokens.",
  },
  {
    id: "gpt",
    title: "The GPT",
    short: "GPT",
    chapter: "The GPT architecture",
    build: gptPanel,
    needs: ["stack"],
    intro: "The parts, assembled.",
  },
  {
    id: "transformer",
    title: "The transformer",
    short: "Transformer",
    build: transformerPanel,
    needs: ["encoder"],
    intro: "The original one, made for translation, has an encoder, which reads, and a decoder, which writes.",
  },
  {
    id: "learned",
    title: "It learned this",
    short: "Learned",
    build: learnedPanel,
    needs: ["snapshots"],
    intro: "Your model as it was after each of these steps of its training, for the same text, from noise to now.",
  },
  {
    id: "step",
    title: "One step of training",
    short: "One step",
    build: stepPanel,
    needs: ["training"],
    intro:
      "What a step of training on this text alone would change. The optimizer is the rule by which the gradient moves " +
      "the weights. At the top of this page the model takes such steps.",
  },
];
