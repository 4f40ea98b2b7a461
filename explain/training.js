/* Training: the loss of a batch, its gradients by the tape of engine.js, and the rules of humptygpt/training/optimizers.py. */

/** The trace of a text, {idx, targets: as in crossEntropy()}, up to its losses, each divided by count. */
function lossTrace(model, { idx, targets }, count) {
  const trace = gpt(model, idx, { dropout: (x) => x });
  trace.logits = head(model, trace.output);
  return { ...trace, losses: crossEntropy(trace.logits, targets, count) };
}

const countTargets = (texts) => texts.flatMap(({ targets }) => targets).filter((id) => id >= 0).length;

/** Compute the losses of the texts of a batch, and the gradients of their mean. Returns f(losses), which may read the
gradients of the weights.

model: from load(). look(trace) is called for each text, and may also read the gradients of the numbers in its trace.
They are freed before the next text, so a batch needs no more memory than a text. */
function differentiate(model, texts, f, look = () => {}) {
  const { engine } = model;
  const count = countTargets(texts);
  const lossesOf = (text) => {
    try {
      engine.tape = [];
      const { losses, ...trace } = lossTrace(model, text, count);
      while (engine.tape.length) engine.tape.pop()();
      look(trace);
      return losses;
    } finally {
      engine.tape = null;
    }
  };
  return engine.scope(() => {
    for (const [, weight] of namedWeights(model)) weight.gradient = engine.zeros(weight.rows, weight.columns);
    const losses = texts.flatMap((text) => engine.scope(() => lossesOf(text)));
    return f(losses);
  });
}

/** The mean loss of texts, without gradients. */
function meanLoss(model, texts) {
  return meanOf(texts.flatMap((text) => model.engine.scope(() => lossTrace(model, text, 1).losses)));
}

// --------------------------------------------------------------------------------------
// Rules. Each changes the numbers of a weight by its gradient. state: what a rule keeps of a weight between steps.

/** The rate times the mean gradient, divided by its root mean square. */
function adamw(weight, state, { rate, decay, clip, step, beta1, beta2 }) {
  const [W, G] = numbersOf(weight, weight.grad);
  const mean = (state.mean ??= new Float32Array(W.length));
  const square = (state.square ??= new Float32Array(W.length));
  const [size, scale] = [rate / (1 - beta1 ** step), 1 / Math.sqrt(1 - beta2 ** step)];
  for (let i = 0; i < W.length; i++) {
    const g = clip * G[i];
    mean[i] += (1 - beta1) * (g - mean[i]);
    square[i] += (1 - beta2) * (g * g - square[i]);
    W[i] = W[i] * (1 - rate * decay) - (size * mean[i]) / (Math.sqrt(square[i]) * scale + 1e-8);
  }
}

/** The momentum with all singular values set to about 1. */
function muon(weight, state, { rate, decay, clip, muon_momentum, beta2, normalizes = false }) {
  const { engine, rows, columns } = weight;
  engine.scope(() => {
    const momentum = (state.momentum ??= new Float32Array(rows * columns));
    const x = engine.matrix(rows, columns);
    const [X, G] = numbersOf(x, weight.grad);
    for (let i = 0; i < X.length; i++) {
      const g = clip * G[i];
      momentum[i] += (1 - muon_momentum) * (g - momentum[i]);
      X[i] = g + muon_momentum * (momentum[i] - g); // Nesterov's
    }
    const update = rows > columns ? orthogonalize(x.transposed()).transposed() : orthogonalize(x);
    if (normalizes) normalizeNeurons(update, state, beta2);
    const [W, Y] = numbersOf(weight, update);
    const size = rate * Math.sqrt(Math.max(1, rows / columns));
    for (let i = 0; i < W.length; i++) W[i] = W[i] * (1 - rate * decay) - size * Y[i];
  });
}

/** U S V^T -> approximately U V^T, by five steps of Newton and Schulz. x has at most as many rows as columns. */
function orthogonalize(x) {
  const { engine, rows } = x;
  const norm = Math.sqrt(squaresOf(x)) + 1e-7;
  x = map(x, (value) => value / norm);
  const [a, b] = [engine.matrix(rows, rows), engine.matrix(rows, rows)];
  for (let step = 0; step < 5; step++) {
    product(a, x, x.transposed());
    product(b, a, a);
    const y = like(x);
    const [A, B, X, Y] = numbersOf(a, b, x, y);
    for (let i = 0; i < B.length; i++) B[i] = 2.0315 * B[i] - 4.775 * A[i];
    for (let i = 0; i < X.length; i++) Y[i] = 3.4445 * X[i];
    product(y, b, x, true);
    x = y;
  }
  return x;
}

/** Divide each neuron's part of an update by its root mean square over recent steps; the norm of the whole stays. A
neuron is a row, or a column if there are more columns than rows. */
function normalizeNeurons(update, state, beta2) {
  const { rows, columns, data } = update;
  const neuron = rows >= columns ? (i) => Math.floor(i / columns) : (i) => i % columns;
  const n = Math.max(rows, columns);
  const squares = new Float64Array(n);
  for (let i = 0; i < data.length; i++) squares[neuron(i)] += data[i] * data[i];
  const recent = (state.neurons ??= new Float32Array(n));
  let [before, after] = [0, 0];
  squares.forEach((square, j) => {
    recent[j] += (1 - beta2) * (square / (data.length / n) - recent[j]);
    before += square;
    after += square / (recent[j] + 1e-10);
  });
  const scale = Math.sqrt(before) / (Math.sqrt(after) + 1e-10);
  for (let i = 0; i < data.length; i++) data[i] *= scale / Math.sqrt(recent[neuron(i)] + 1e-10);
}

const normuon = (weight, state, settings) => muon(weight, state, { ...settings, normalizes: true });

/** {optimizer: [rule of the matrices in the blocks, key of their peak rate, rule of all other weights]} */
const OPTIMIZERS = {
  adamw: [adamw, "learning_rate", adamw],
  muon: [muon, "muon_learning_rate", adamw],
  normuon: [normuon, "muon_learning_rate", adamw],
};

/** From 1 at progress 0 to 0 at progress 1. */
const SCHEDULES = {
  cosine: (progress) => 0.5 * (1 + Math.cos(Math.PI * progress)),
  linear: (progress) => 1 - progress,
  wsd: (progress) => Math.min(1, (1 - progress) / 0.2),
};

/** The learning rate of a step, counted from 0, as a fraction of the peak: see lr() in humptygpt/training/settings.py. */
function rateAt(step, { decay_lr, warmup_iters, schedule, min_lr, learning_rate, lr_decay_iters, max_iters }) {
  if (!decay_lr) return 1;
  if (step < warmup_iters) return (step + 1) / (warmup_iters + 1);
  const [least, end] = [min_lr === null ? 0.1 : min_lr / learning_rate, lr_decay_iters ?? max_iters];
  if (step >= end) return least;
  return least + SCHEDULES[schedule]((step - warmup_iters) / (end - warmup_iters)) * (1 - least);
}

/** Trains a copy of a model. settings: keys of TrainConfig. */
class Trainer {
  constructor(model, settings) {
    this.model = load(model);
    this.settings = settings;
    this.steps = 0; // that were taken
    const [hidden, hiddenRate, others] = OPTIMIZERS[settings.optimizer];
    this.weights = namedWeights(this.model).map(([name, weight]) => {
      const [rule, peak] = /_proj\.weight$/.test(name) ? [hidden, hiddenRate] : [others, "learning_rate"];
      const decay = weight.turned ? settings.weight_decay : 0; // of matrices, not of vectors
      return { name, weight, rule, peak: settings[peak], decay, state: {} };
    });
  }

  /** Take a step. Returns the losses, and the norm of the gradient before it was clipped. look: see differentiate(). */
  step(texts, look) {
    const { settings, weights } = this;
    const update = (losses) => {
      const norm = Math.sqrt(weights.reduce((sum, { weight }) => sum + squaresOf(weight.grad), 0));
      const clip = settings.grad_clip ? Math.min(settings.grad_clip / (norm + 1e-6), 1) : 1;
      const scale = rateAt(this.steps++, settings);
      for (const { weight, rule, peak, decay, state } of weights) {
        rule(weight, state, { ...settings, rate: peak * scale, decay, clip, step: this.steps });
        if (weight.turned) weight.transposed(weight.turned);
      }
      return { losses, norm };
    };
    return differentiate(this.model, texts, update, look);
  }

  numbers() {
    return this.weights.map(({ weight }) => weight.data.slice());
  }

  /** A copy of all that steps change. */
  state() {
    const states = structuredClone(this.weights.map(({ state }) => state));
    return { steps: this.steps, numbers: this.numbers(), states };
  }

  restore({ steps, numbers, states }) {
    this.steps = steps;
    setWeights(this.model, numbers);
    structuredClone(states).forEach((state, i) => (this.weights[i].state = state));
  }
}

function squaresOf({ data }) {
  let sum = 0;
  for (let i = 0; i < data.length; i++) sum += data[i] * data[i];
  return sum;
}
