"use strict";

/* Computation in a worker, so that the page never waits.

The page asks under a topic; a newer question under the same topic makes the older one outdated: it is dropped at the
next look, which comes every few tokens. Traces are kept, so that a text that begins as an earlier one costs only what
follows. A trace goes to the page as the rows that it does not have yet, in one buffer that is handed over. */

const PLAIN_RATE = 0.1; // learning rate of plain gradient descent
const STRIDE = 16; // tokens between two looks at what has arrived
const KEPT = 4; // number of traces that are kept

class Computer {
  constructor(post) {
    this.post = post;
    this.latest = {}; // id of the newest question under each topic
    this.traces = []; // the newest first
    this.sent = null; // the trace that the page has got
  }

  /** message: {topic, id, ...}. The answer {id, ...} is posted, or only {id} if a newer question came meanwhile. */
  async answer(message) {
    const { topic, id } = message;
    this.latest[topic] = id;
    const wanted = () => this.latest[topic] === id;
    let answer;
    try {
      answer = await TOPICS[topic](this, message, wanted);
    } catch (error) {
      answer = { problem: error.message };
    }
    this.post(wanted() ? { id, ...answer } : { id });
    if (wanted() && topic === "read" && !answer.problem) await this.readAhead(wanted);
  }

  /** Compute the trace of these tokens, a few at a time; null if it is no longer wanted. */
  async trace(idx, options, wanted, before = null) {
    let trace = before;
    let end = before ? commonLength(idx, before.idx) : 0;
    do {
      end = Math.min(end + STRIDE, idx.length);
      trace = forward(options.model ?? this.model, idx.slice(0, end), { ...options, before: trace, lastOnly: true });
      if (options.keep) this.keep(trace, before);
      before = trace;
      if (end < idx.length) await nextMessage();
      if (!wanted()) return null;
    } while (end < idx.length);
    return trace;
  }

  /** The kept trace that has most of these tokens. */
  nearest(idx, source) {
    const same = this.traces.filter((trace) => sameIds(source ?? [], trace.source?.idx ?? []));
    const common = (trace) => commonLength(idx, trace.idx);
    return same.reduce((best, trace) => (best && common(best) >= common(trace) ? best : trace), null);
  }

  /** Keep a trace instead of the trace that it continues. */
  keep(trace, from) {
    const others = this.traces.filter((other) => other !== from || other === this.sent);
    this.traces = [trace, ...others].slice(0, KEPT);
  }

  /** If the context will soon be full, compute the trace of the half that will be left. */
  async readAhead(wanted) {
    const { ids, idx } = this.read;
    const { block_size } = this.model.config;
    if (this.model.config.model !== "gpt" || this.translates || idx.length < 0.75 * block_size) return;
    const start = contextStart(this.model.config, ids.length + block_size + 1 - idx.length);
    const next = ids.slice(start);
    await new Promise((done) => setTimeout(done, 50)); // the page is painting, and there may be no third core
    if (next.length && wanted()) await this.trace(next, { keep: true }, wanted, this.nearest(next));
  }

  /** The rows that the page does not have yet. */
  news(trace) {
    const { sent } = this;
    const same = sent && sameIds(trace.source?.idx ?? [], sent.source?.idx ?? []);
    const first = same ? commonLength(trace.idx, sent.idx) : 0;
    this.sent = trace;
    const { logits, probs, source, ...rest } = trace;
    const rows = first < trace.idx.length ? mapTrace(rest, (value) => value.slice(first)) : null;
    return { first, last: [logits.at(-1), probs.at(-1)], ...pack({ rows, source: same ? null : source }) };
  }
}

const resumed = []; // functions to call when the messages before them have been read
const turns = new MessageChannel();

/** A promise that resolves after the messages that have already arrived. A timer would wait for 4 ms. */
function nextMessage() {
  turns.port1.onmessage = () => resumed.shift()();
  return new Promise((done) => {
    resumed.push(done);
    turns.port2.postMessage(null);
  });
}

/** The questions that can be asked: (computer, message, wanted) => the answer. */
const TOPICS = {
  open(computer, { text, checksum }) {
    const { weights, snapshots, ...data } = readData(text, checksum);
    computer.model = makeModel({ weights, ...data });
    computer.models = snapshots.map((snapshot) => once(() => makeSnapshot({ weights, ...data }, snapshot)));
    computer.models.push(() => computer.model);
    // tied tensors count once
    const tensors = weights.tensors.filter(({ offset }, i, all) => all.findIndex((x) => x.offset === offset) === i);
    data.names = tensors.map(({ name }) => name);
    data.parameters = tensors.reduce((sum, { shape }) => sum + sizeOf(shape), 0);
    data.steps = [...snapshots.map(({ iter }) => iter), data.progress.iter];
    computer.tokenizer = makeTokenizer(data.tokenizer);
    computer.translates = data.task === "translation";
    computer.settings = data.training;
    return { data, model: computer.model };
  },

  /** text, source: as typed. ids: given if the model wrote the text, because other ids can have the same text. */
  async read(computer, { text, source, ids }, wanted) {
    const read = computer.translates ? readPair(computer, source, text, ids) : readText(computer, text, ids);
    const options = { source: read.source ?? null, keep: true };
    const trace = await computer.trace(read.idx, options, wanted, computer.nearest(read.idx, read.source));
    if (!trace) return null;
    computer.read = read;
    const skipped = { text: computer.tokenizer.skipped(text), source: computer.tokenizer.skipped(source) };
    return { ids: read.ids, lost: read.lost, skipped, news: computer.news(trace) };
  },

  /** The prediction after these tokens with branches switched off. names: as dropout() of forward() gives them. */
  async off(computer, { idx, source, names }, wanted) {
    const dropout = (x, name) => (names.includes(name) ? x.engine.zeros(x.rows, x.columns) : x);
    const trace = await computer.trace(idx, { source, dropout }, wanted);
    return trace && { probs: trace.probs.at(-1) };
  },

  /** The predictions of networks with each activation of embeddings and branches zeroed with probability p. */
  async thinned(computer, { idx, source, p, seeds }, wanted) {
    const results = [];
    for (const seed of seeds) {
      const random = randomNumbers(seed);
      const dropout = (x) => map(x, (value) => (random() < p ? 0 : value / (1 - p)));
      const trace = await computer.trace(idx, { source, dropout }, wanted);
      if (!trace) return null;
      results.push(trace.probs.at(-1));
    }
    return { results };
  },

  /** The text after step data.steps[number] of training: losses of its tokens, and the prediction after token t. */
  async learned(computer, { number, idx, source, t, layer, head }, wanted) {
    const model = computer.models[number]();
    const before = await computer.trace(idx, { source, model }, wanted);
    if (!before) return null;
    const trace = forward(model, idx, { source, before });
    const { blocks } = trace.stack ?? trace.decoder ?? {};
    const attention = blocks ? blocks[layer].attn.weights[head][t] : null;
    return { losses: tokenLosses(trace), probs: trace.probs[t], attention, wte: trace.wte[t] };
  },

  /** Train a copy of the model on these tokens alone for `count` steps. Returns losses and last prediction before and
  after, the losses of all steps, and the sizes of the last step. factor: of the run's learning rate. */
  async descend(computer, { idx, optimizer, factor, count }, wanted) {
    const text = JSON.stringify([idx, optimizer, factor]);
    if (computer.trial?.text !== text || computer.trial.trainer.steps > count) {
      computer.trial = { text, trainer: makeTrainer(computer, optimizer, factor), losses: [], sizes: null };
    }
    const { trial } = computer;
    while (trial.trainer.steps < count) {
      const { losses, sizes } = stepWithSizes(trial.trainer, batchOf(idx));
      trial.losses.push(meanOf(losses));
      trial.sizes = sizes;
      await nextMessage();
      if (!wanted()) return null;
    }
    const [before, after] = [computer.model, trial.trainer.model].map((model) => outcome(model, idx));
    return { before, after, losses: trial.losses, sizes: trial.sizes };
  },

  /** The derivatives of the loss of these tokens by the weights and by the numbers of their trace, and how far a step
  moves each weight. */
  gradient(computer, { idx, optimizer, factor }) {
    const trainer = makeTrainer(computer, optimizer, factor);
    const { weights } = trainer.model;
    const gradients = (tree) => toRows(mapTree(tree, isMatrix, ({ gradient }) => gradient)); // null: nothing reads it
    const before = new Map(trainer.weights.map(({ weight }) => [weight, weight.data.slice()]));
    let seen;
    trainer.step(batchOf(idx), (trace) => (seen = { weights: gradients(weights), trace: gradients(trace) }));
    const moved = mapTree(weights, isMatrix, (weight) =>
      weight.toRows().map((row, r) => row.map((x, i) => x - before.get(weight)[r * row.length + i])),
    );
    return pack({ ...seen, moved });
  },

  /** The prediction after the first tokens of a reply. turns: what was said before it. */
  async reply(computer, { turns, ids }, wanted) {
    const { block_size } = computer.model.config;
    const idx = [...computer.tokenizer.encodeTurns(turns), ...ids];
    const problem = `This takes ${idx.length} tokens, and the context has ${block_size}: nothing more fits into it.`;
    if (idx.length >= block_size) return { problem, full: true };
    const trace = await computer.trace(idx, { keep: true }, wanted, computer.nearest(idx));
    return trace && { logits: trace.logits.at(-1), probs: trace.probs.at(-1) };
  },

  /** The prediction after other tokens. */
  async other(computer, { idx, source }, wanted) {
    const trace = await computer.trace(idx, { source }, wanted, computer.nearest(idx, source));
    return trace && { probs: trace.probs.at(-1) };
  },
};

/** A function that calls f only once and keeps its result. */
function once(f) {
  let made;
  return () => (made ??= f());
}

function outcome(model, idx) {
  const trace = forward(model, idx);
  return { losses: tokenLosses(trace), probs: trace.probs.at(-1) };
}

/** A text as a batch: each token predicts the next one. */
function batchOf(idx) {
  return [{ idx, targets: [...idx.slice(1), -1] }];
}

/** A trainer of a copy of the run's model, by the run's rules at a constant rate, or by plain gradient descent. */
function makeTrainer({ model, settings }, optimizer, factor) {
  const rates = ["learning_rate", "muon_learning_rate"].map((key) => [key, settings[key] * factor]);
  const keys = { ...settings, ...Object.fromEntries(rates), decay_lr: false, optimizer };
  if (optimizer === "gradient_descent") Object.assign(keys, { learning_rate: PLAIN_RATE * factor, grad_clip: 0 });
  return new Trainer(model, keys);
}

/** Take a step. Returns its losses, and of each part of the model the norms of its gradient, of its weights and of
their change. */
function stepWithSizes(trainer, batch) {
  const { weights } = trainer;
  const before = weights.map(({ weight }) => weight.data.slice());
  let gradients;
  const measure = () => (gradients = weights.map(({ weight }) => squaresOf(weight.grad)));
  const { losses } = trainer.step(batch, measure);
  const squares = weights.map(({ name, weight }, i) => ({
    part: partOf(name),
    gradient: gradients[i],
    weights: squaresOf({ data: before[i] }),
    moved: squaresOf({ data: weight.data.map((x, at) => x - before[i][at]) }),
  }));
  const parts = Map.groupBy(squares, ({ part }) => part);
  const sizes = Array.from(parts, ([name, all]) => {
    const norm = (key) => Math.sqrt(all.reduce((sum, each) => sum + each[key], 0));
    return { name, gradient: norm("gradient"), weights: norm("weights"), moved: norm("moved") };
  });
  return { losses, sizes };
}

function partOf(name) {
  const [, layer, branch] = name.match(/blocks\.(\d+)\.([a-z]+)/) ?? [];
  if (layer) return `layer ${+layer + 1} ${branch === "attn" ? "attention" : "MLP"}`;
  return { wte: "embedding", lm_head: "head" }[name.split(".")[0]] ?? (name.includes("wpe") ? "positions" : "norm");
}

// --------------------------------------------------------------------------------------
// A trace as one buffer

/** form: the value with {from, lengths} instead of each list of rows. The rows follow one another in numbers. */
function pack(value) {
  const lists = [];
  const places = new Map(); // keyed by the first row, so that a list with several names is stored once
  let size = 0;
  const isList = (part) => Array.isArray(part) && ArrayBuffer.isView(part[0]);
  const form = mapTree(value, isList, (rows) => {
    if (!places.has(rows[0])) {
      const lengths = rows.map((row) => row.length);
      places.set(rows[0], { from: size, lengths });
      lists.push(rows);
      size = lengths.reduce((sum, length) => sum + length, size);
    }
    return places.get(rows[0]);
  });
  const numbers = new Float32Array(size);
  let at = 0;
  for (const row of lists.flat()) {
    numbers.set(row, at);
    at += row.length;
  }
  return { form, numbers };
}

function unpack({ form, numbers }) {
  const made = new Map();
  const isPlace = (part) => part?.lengths !== undefined;
  return mapTree(form, isPlace, ({ from, lengths }) => {
    let at = from;
    const rows = () => lengths.map((length) => numbers.subarray(at, (at += length)));
    if (!made.has(from)) made.set(from, rows());
    return made.get(from);
  });
}

// --------------------------------------------------------------------------------------
// The two ends of the connection

/** In the worker: answer the page's questions. */
function serve() {
  const computer = new Computer((answer) => {
    const { numbers } = answer.news ?? answer;
    postMessage(answer, numbers ? [numbers.buffer] : []);
  });
  onmessage = ({ data }) => computer.answer(data);
}

/** In the page: the worker, and the trace of the last text that it has read. */
class Desk {
  /** scripts: texts of the files that the worker needs. */
  constructor(scripts) {
    this.trace = null;
    this.questions = new Map();
    this.asked = 0;
    const blob = new Blob([...scripts, "serve();"], { type: "text/javascript" });
    this.worker = new Worker(URL.createObjectURL(blob));
    this.worker.onmessage = ({ data: { id, ...answer } }) => {
      if (answer.news) this.take(answer.news);
      this.questions.get(id)?.(answer);
      this.questions.delete(id);
      this.onAnswer?.();
    };
  }

  /** Ask the worker. If a newer question under the same topic follows, the answer may be empty. */
  ask(topic, message) {
    const id = this.asked++;
    this.worker.postMessage({ topic, id, ...message });
    return new Promise((done) => this.questions.set(id, done));
  }

  take({ first, last, form, numbers }) {
    const { rows, source } = unpack({ form, numbers });
    const { logits = [], probs = [], source: before, ...old } = this.trace ?? {};
    const kept = first ? firstTokens(old, first) : null;
    const trace = rows ? appendTokens(kept, rows) : kept;
    const predictions = [logits, probs].map((list, i) => {
      const filled = Array.from(trace.idx, (_, t) => (t < first ? (list[t] ?? null) : null));
      filled[filled.length - 1] = last[i];
      return filled;
    });
    this.trace = { ...trace, logits: predictions[0], probs: predictions[1], first };
    if (source ?? (first && before)) this.trace.source = source ?? before;
  }
}

if (typeof module !== "undefined") module.exports = { Computer, unpack };
