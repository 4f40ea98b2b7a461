/* A run in the worker: a text becomes batches, a model is made, trained, evaluated, and kept at some of its steps. */

// --------------------------------------------------------------------------------------
// A model that nobody has trained

/** [name, shape, standard deviation of its numbers, which are drawn as by init_weights() in model.py; 1 of a norm] of
each weight of a GPT. config: keys of ModelConfig. */
function initialWeights(config) {
  const { n_layer, n_embd: C, vocab_size: V, position, norm, block, mlp, tie_weights } = config;
  const hidden = mlp === "gated" ? 8 * Math.ceil(C / 3) : 4 * C;
  const linears = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj"].map((name) => [name, C, C]);
  if (mlp === "gated") linears.push(["mlp.gate_proj", hidden, C]);
  if (mlp !== "none") linears.push(["mlp.up_proj", hidden, C], ["mlp.down_proj", C, hidden]);
  const branches = n_layer * (mlp === "none" ? 1 : 2);
  const weights = [["wte.weight", [V, C], 0.02]];
  if (position === "learned") weights.push(["stack.position.wpe.weight", [config.block_size, C], 0.02]);
  const add = (name) => norm !== "none" && weights.push([`${name}.weight`, [C], "norm"]);
  for (let i = 0; i < n_layer; i++) {
    add(`stack.blocks.${i}.attn_norm`);
    if (mlp !== "none") add(`stack.blocks.${i}.mlp_norm`);
    for (const [name, rows, columns] of linears) {
      const last = /o_proj|down_proj/.test(name);
      const std = BLOCKS[block].residual ? 0.02 / Math.sqrt(last ? branches : 1) : 1 / Math.sqrt(columns);
      weights.push([`stack.blocks.${i}.${name}.weight`, [rows, columns], std]);
    }
  }
  if (block !== "post_norm") add("stack.norm");
  if (!tie_weights) weights.push(["lm_head.weight", [V, C], 0.02]);
  return weights;
}

/** A model with initial weights, the same ones for the same seed, in the form that makeModel() gives. */
function untrainedModel(config, seed) {
  const random = randomNumbers(seed);
  const weights = {};
  for (const [name, shape, std] of initialWeights(config)) {
    const data = Float32Array.from({ length: sizeOf(shape) }, () => (std === "norm" ? 1 : std * normal(random)));
    plant(weights, name.split("."), { data, shape });
  }
  if (config.tie_weights) weights.lm_head = weights.wte;
  return { config, weights, tokenizer_vocab_size: config.vocab_size };
}

/** The data of a tokenizer of the characters of a text: see tokenizer_data() in humptygpt/page/page_data.py. */
function charactersOf(text) {
  const alphabet = [...new Set(text)].sort((a, b) => a.codePointAt(0) - b.codePointAt(0));
  const pieces = alphabet.map((char) => utf8(char));
  const lengths = pieces.map((piece) => piece.length);
  return { name: "char", eot: null, alphabet: alphabet.join(""), pieces: { bytes: btoa(pieces.join("")), lengths } };
}

// --------------------------------------------------------------------------------------
// The run

const LEAST_HELD = 200; // characters of a validation part: of a shorter text, all is learned and evaluated
const EVALUATED = 2048; // tokens that an evaluation reads
const SAMPLE = 160; // tokens of a sample
const WRITING = 200; // ms after which a sample ends before
const MOST_KEPT = 40; // the most steps whose weights are kept; a large model keeps fewer
const KEPT_NUMBERS = 5e7; // weights and the optimizer's averages of all kept steps together
const nextKept = (step) => Math.max(step + 10, Math.ceil(1.07 * step));

class Run {
  /** model: the one to begin with. ids: tokens of the text. prompt: those that samples begin with. first: steps of the
  model before. settings: keys of TrainConfig. */
  constructor(model, { ids, prompt, first = 0 }, settings) {
    const held = ids.length >= 10 * LEAST_HELD ? Math.floor(ids.length / 10) : 0;
    this.train = ids.slice(0, ids.length - held);
    this.held = held ? ids.slice(-held) : this.train;
    this.trainer = new Trainer(model, settings);
    Object.assign(this, { settings, first, prompt: prompt.length ? prompt : ids.slice(0, 1), failed: false });
    this.kept = []; // {step, val_loss, sample, and the state of the trainer} of some steps
    this.due = 0; // the next model is kept at this step or later
    this.losses = []; // [step, loss] of each step that the page does not know yet
    this.taken = this.spent = 0; // steps, and the ms that they took, with evaluations, samples and answers to the page
    const numbers = 3 * this.trainer.weights.reduce((sum, { weight }) => sum + weight.data.length, 0);
    this.mostKept = Math.min(MOST_KEPT, Math.ceil(KEPT_NUMBERS / numbers) + 1);
  }

  get step() {
    return this.first + this.trainer.steps;
  }

  /** A crop of `ids` that begins at a fraction of the places where it can. */
  crop(ids, fraction) {
    const T = Math.min(this.trainer.model.config.block_size, ids.length - 1);
    const at = Math.min(Math.floor(fraction * (ids.length - T)), ids.length - 1 - T);
    return { idx: ids.slice(at, at + T), targets: ids.slice(at + 1, at + 1 + T) };
  }

  /** Take a step on random crops, which depend on the seed and the step alone. */
  advance() {
    this.kept = this.kept.filter(({ step }) => step <= this.step); // after going back, others will follow
    const random = randomNumbers(this.settings.seed * 65537 + this.trainer.steps);
    const texts = Array.from({ length: this.settings.batch_size }, () => this.crop(this.train, random()));
    const loss = meanOf(this.trainer.step(texts).losses);
    this.losses.push([this.step - 1, loss]);
    this.taken++;
    this.failed = !Number.isFinite(loss);
  }

  /** How the training stands; losses: since the last call. */
  news() {
    const { step, losses } = this;
    const ms = this.taken && this.spent / this.taken; // a step, on average
    this.losses = [];
    return { step, ms, losses, kept: this.kept.map(({ step, val_loss, sample }) => ({ step, val_loss, sample })) };
  }

  /** Evaluate and keep the model of now. From step 100 on, it is kept ten times while the steps double. */
  keep() {
    const { step } = this;
    const before = this.kept.filter((each) => each.step < step);
    if (before.length >= this.mostKept) before.splice(before.length >> 1, 1);
    this.kept = [...before, { step, val_loss: this.evaluate(), sample: this.write(), ...this.trainer.state() }];
    this.due = nextKept(step);
  }

  evaluate() {
    const { model } = this.trainer;
    const n = Math.ceil(EVALUATED / Math.min(model.config.block_size, this.held.length));
    return meanLoss(model, Array.from({ length: n }, (_, i) => this.crop(this.held, i / n)));
  }

  /** What the model writes after the prompt, at temperature 0.8. */
  write() {
    const { model } = this.trainer;
    const random = randomNumbers(this.settings.seed);
    const ids = [...this.prompt];
    const end = performance.now() + WRITING;
    let trace = null;
    for (let n = 0; n < SAMPLE && performance.now() < end; n++) {
      const idx = ids.slice(contextStart(model.config, ids.length));
      trace = forward(model, idx, { before: trace, lastOnly: true });
      const probs = softmax(trace.logits.at(-1).map((logit) => logit / 0.8));
      ids.push(drawFrom(probs, random()));
    }
    return ids;
  }

  /** Go back to a step that was kept. */
  back(step) {
    this.trainer.restore(this.kept.find((each) => each.step === step));
    this.due = nextKept(step);
    this.failed = false;
  }
}
