/* Computation in a worker, so that the page never waits.

The page asks under a topic; a newer question under the same topic makes the older one outdated: it is dropped at the
next look, which comes every few tokens. Traces are kept, so that a text that begins as an earlier one costs only what
follows. A trace goes to the page as the rows that it does not have yet, in one buffer that is handed over. */

const STRIDE = 16; // tokens between two looks at what has arrived
const KEPT = 4; // number of traces that are kept
const TELL_EVERY = 200; // ms between two reports of a training, which the page then draws
const START = 12; // characters of a text with which a playground's page starts

class Computer {
  constructor(post) {
    this.post = post;
    this.latest = {}; // id of the newest question under each topic
    this.snapshots = []; // {step, make(), and model once it is made} of the run that the page was made from
    this.run = null; // the training in this page: see run.js
  }

  /** Compute with this model from now on. data: as in a page of a run. Returns what the page needs. */
  open(model, data) {
    const weights = namedWeights(model);
    const parameters = weights.reduce((sum, [, { data }]) => sum + data.length, 0);
    this.data = { ...data, parameters, names: weights.map(([name]) => name), rounded: this.snapshots.length };
    Object.assign(this, { model, step: data.progress.iter, settings: data.training, run: null });
    this.past = this.original = this.learner = null;
    this.traces = []; // the newest first
    this.sent = null; // the trace that the page has got
    this.tokenizer = makeTokenizer(data.tokenizer);
    this.translates = data.task === "translation";
    return { data: { ...this.data, steps: this.steps }, model };
  }

  /** The steps at which a model can be shown: those of snapshots and of the training here, and the present one. */
  get steps() {
    const past = [...this.snapshots, ...(this.run?.kept ?? [])].map(({ step }) => step);
    return [...past.filter((step) => step < this.step), this.step];
  }

  modelAt(step) {
    const snapshot = this.snapshots.find((each) => each.step === step);
    if (step === this.step) return this.model;
    if (snapshot) return (snapshot.model ??= snapshot.make());
    this.past ??= load(this.model);
    setWeights(this.past, this.run.kept.find((each) => each.step === step).numbers);
    return this.past;
  }

  /** Show the weights that the training has come to. Returns what the page needs for it; null if it has them. */
  follow() {
    const { run, model } = this;
    if (!run || run.step === this.step) return null;
    Object.assign(this, { step: run.step, traces: [], sent: null });
    const numbers = run.trainer.numbers();
    setWeights(model, numbers);
    if (LOADED.has(model)) setWeights(LOADED.get(model), numbers);
    return { numbers, steps: this.steps };
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
    const first = same && isCausal(this.model.config) ? commonLength(trace.idx, sent.idx) : 0;
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

const OTHERWISE =
  "This page would show other numbers than model.py computed when the page was made: if model.py was edited, make the " +
  "same edit in explain/model.js, or undo it, and make the page again with explain.py.";
const TOLERANCE = 1e-4; // of the largest logit; models that agree have differed by up to 7e-6 of it

/** Does the page compute the logits that PyTorch computed for a text, which is its source, too? logits: their mean over
the tokens. */
function agrees(model, { idx, logits }) {
  const expected = new Float32Array(toBytes(atob(logits)).buffer);
  const largest = expected.reduce((most, logit) => Math.max(most, Math.abs(logit)), 0);
  try {
    const rows = forward(model, idx, { source: model.config.model === "transformer" ? idx : null }).logits;
    return expected.every((logit, v) => Math.abs(meanOf(rows.map((row) => row[v])) - logit) <= TOLERANCE * largest);
  } catch {
    return false; // it has a part that is not in model.js
  }
}

/** The questions that can be asked: (computer, message, wanted) => the answer. */
const TOPICS = {
  open(computer, { text, checksum }) {
    const packed = readData(text, checksum);
    const { weights, snapshots, check, ...data } = packed;
    if (!weights) return { data }; // of a playground, which begins with a text
    computer.snapshots = snapshots.map((each) => ({ step: each.iter, make: () => makeSnapshot(packed, each) }));
    const model = makeModel(packed);
    return agrees(model, check) ? computer.open(model, data) : { problem: OTHERWISE };
  },

  /** Prepare a training on a text: of a new model with this config, or, without one, of the model of the page's run. */
  begin(computer, { text, config, training }) {
    let opened = {};
    const metrics = [];
    if (config) {
      const tokenizer = charactersOf(text);
      const vocab_size = tokenizer.pieces.lengths.length;
      const model = untrainedModel({ ...config, vocab_size }, training.seed);
      const start = beginning(text.trimStart(), START);
      const page = { name: "Inside your GPT", task: "language modelling", metrics, start };
      opened = computer.open(model, { ...page, progress: { iter: 0 }, training, model: model.config, tokenizer });
    }
    const ids = computer.tokenizer.encode(text);
    if (ids.length < 2) return { problem: "The model knows fewer than two characters of this text." };
    computer.original ??= namedWeights(computer.model).map(([, { data }]) => data.slice());
    setWeights(computer.model, computer.original);
    const prompt = computer.tokenizer.encode(computer.data.start).slice(0, START);
    computer.run = new Run(computer.model, { ids, prompt, first: computer.data.progress.iter }, training);
    Object.assign(computer, { settings: training, learner: null });
    computer.step = null; // the shown weights may be those of another training
    computer.run.keep();
    const progress = computer.run.news();
    metrics.push({ kind: "eval", iter: 0, val_loss: progress.kept[0].val_loss }); // until the page has others
    return { ...opened, progress };
  },

  /** Train until this step, and tell the page about it on the way. A later question, with until=0, ends it. */
  async train({ run, post }, { until }, wanted) {
    let told = performance.now();
    let from = told;
    while (run.step < until && wanted() && !run.failed) {
      run.advance();
      if (run.step >= run.due || run.step === until) run.keep();
      const now = performance.now();
      run.spent += now - from;
      from = now;
      if (now > told + TELL_EVERY) {
        post({ event: run.news() });
        told = now;
      }
      await nextMessage();
    }
    post({ event: run.news() });
  },

  /** Go back to a step that was kept. */
  back({ run }, { step }) {
    run.back(step);
  },

  /** text, source: as typed. ids: given if the model wrote the text, because other ids can have the same text. fresh: of
  the weights that the training has come to. */
  async read(computer, { text, source, ids, fresh }, wanted) {
    if (fresh) computer.moved = computer.follow() ?? computer.moved;
    const read = computer.translates ? readPair(computer, source, text, ids) : readText(computer, text, ids);
    const options = { source: read.source ?? null, keep: true };
    const trace = await computer.trace(read.idx, options, wanted, computer.nearest(read.idx, read.source));
    if (!trace) return null;
    computer.read = read;
    const skipped = { text: computer.tokenizer.skipped(text), source: computer.tokenizer.skipped(source) };
    const { moved } = computer;
    computer.moved = null;
    return { ids: read.ids, lost: read.lost, skipped, moved, news: computer.news(trace) };
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

  /** The text after a step of training: losses of its tokens, and the prediction after token t. */
  async learned(computer, { step, idx, source, t, layer, head }, wanted) {
    const model = computer.modelAt(step);
    const before = await computer.trace(idx, { source, model }, wanted);
    if (!before) return null;
    const trace = forward(model, idx, { source, before });
    const { blocks } = trace.stack ?? trace.decoder ?? {};
    const attention = blocks ? blocks[layer].attn.weights[head][t] : null;
    return { losses: tokenLosses(trace), probs: trace.probs[t], attention, wte: trace.wte[t] };
  },

  /** The mean loss of these tokens, its derivatives by the weights and by the numbers of their trace, and how far the
  first step of the run's optimizer moves each weight. */
  gradient(computer, { idx }) {
    const { model, settings } = computer;
    const trainer = (computer.learner ??= new Trainer(model, { ...settings, decay_lr: false }));
    const numbers = namedWeights(model).map(([, { data }]) => data);
    trainer.restore({ steps: 0, numbers, states: numbers.map(() => ({})) });
    const { weights } = trainer.model;
    const gradients = (tree) => toRows(mapTree(tree, isMatrix, ({ gradient }) => gradient)); // null: nothing reads it
    const before = new Map(trainer.weights.map(({ weight }, i) => [weight, numbers[i]]));
    let seen;
    const batch = [{ idx, targets: [...idx.slice(1), -1] }]; // each token predicts the next one
    const { losses, norm } = trainer.step(batch, (trace) => {
      seen = { weights: gradients(weights), trace: gradients(trace) };
    });
    const moved = mapTree(weights, isMatrix, (weight) =>
      weight.toRows().map((row, r) => row.map((x, i) => x - before.get(weight)[r * row.length + i])),
    );
    return { loss: meanOf(losses), norm, ...pack({ ...seen, moved }) };
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
};

// --------------------------------------------------------------------------------------
// A trace as one buffer

/** form: the value with {from, to} instead of each list of rows: places among all rows, whose lengths are given and
whose numbers follow one another. */
function pack(value) {
  const rows = [];
  const places = new Map(); // keyed by the first row, so that a list with several names is stored once
  const isList = (part) => Array.isArray(part) && ArrayBuffer.isView(part[0]);
  const form = mapTree(value, isList, (list) => {
    if (!places.has(list[0])) {
      places.set(list[0], { from: rows.length, to: rows.length + list.length });
      for (const row of list) rows.push(row);
    }
    return places.get(list[0]);
  });
  const lengths = rows.map((row) => row.length);
  const numbers = new Float32Array(lengths.reduce((sum, length) => sum + length, 0));
  rows.reduce((at, row) => (numbers.set(row, at), at + row.length), 0);
  return { form, lengths, numbers };
}

function unpack({ form, lengths, numbers }) {
  let end = 0;
  const rows = lengths.map((length) => numbers.subarray(end, (end += length)));
  const isPlace = (part) => part?.to !== undefined;
  return mapTree(form, isPlace, ({ from, to }) => rows.slice(from, to));
}

// --------------------------------------------------------------------------------------
// The two ends of the connection

/** In the worker: answer the page's questions. */
function serve() {
  const computer = new Computer((answer) => {
    const numbers = [(answer.news ?? answer).numbers, ...(answer.moved?.numbers ?? [])];
    postMessage(answer, numbers.filter(Boolean).map(({ buffer }) => buffer));
  });
  onmessage = ({ data }) => computer.answer(data);
}

/** In the page: the worker, and the trace of the last text that it has read. */
class Desk {
  /** script: all that the worker needs. */
  constructor(script) {
    this.trace = null;
    this.questions = new Map();
    this.asked = 0;
    const blob = new Blob([script, "serve();"], { type: "text/javascript" });
    this.worker = new Worker(URL.createObjectURL(blob));
    this.worker.onmessage = ({ data: { id, event, ...answer } }) => {
      if (event) this.onEvent(event);
      if (id === undefined) return;
      if (answer.moved) this.onMove(answer.moved);
      if (answer.news) this.take(answer.news);
      this.questions.get(id)?.(answer);
      this.questions.delete(id);
      this.onQuestions?.();
    };
  }

  /** Ask the worker. If a newer question under the same topic follows, the answer may be empty. */
  ask(topic, message) {
    const id = this.asked++;
    this.worker.postMessage({ topic, id, ...message });
    const answer = new Promise((done) => this.questions.set(id, done));
    this.onQuestions?.();
    return answer;
  }

  take({ first, last, ...packed }) {
    const { rows, source } = unpack(packed);
    const { logits = [], probs = [], source: before, ...old } = this.trace ?? {};
    const kept = first ? firstTokens(old, first) : null;
    const trace = rows ? appendTokens(kept, rows) : kept;
    const filled = (list, row) => trace.idx.map((_, t) => (t < first && list[t]) || null).with(-1, row);
    this.trace = { ...trace, logits: filled(logits, last[0]), probs: filled(probs, last[1]), first };
    if (source ?? (first && before)) this.trace.source = source ?? before;
  }
}
