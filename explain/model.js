/* The forward pass of every model that model.py can build, to be read beside it: the same parts, names and order.

Shapes: T target length, S source length (tokens attended to), C n_embd, H heads, D head size (C / n_head unless
head_size says otherwise), V vocabulary. The heads stand side by side in a row: feature i of head h is row[h * D + i].

Inside, all are matrices of engine.js, whose operations also go backward: training.js uses that. Outside, they are
lists of T rows, one for each token, each a Float32Array of features; weights[h][t][s] are lists of heads. */

// --------------------------------------------------------------------------------------
// Norms

const FLOAT32_EPS = 2 ** -23; // the default of F.rms_norm, which the norm of queries and keys uses

const toList = (matrix) => Array.from(matrix.data);

function layerNorm(x, { weight, bias }, eps) {
  const { output, mean, scale } = standardize(x, x.columns, eps, true);
  const y = multiply(output, weight);
  return { input: x, mean: toList(mean), std: toList(scale), output: bias ? add(y, bias) : y };
}

function rmsNorm(x, { weight }, eps) {
  const { output, scale } = standardize(x, x.columns, eps);
  return { input: x, rms: toList(scale), output: multiply(output, weight) };
}

function noNorm(x) {
  return { input: x, output: x };
}

const NORMS = { layernorm: layerNorm, rmsnorm: rmsNorm, none: noNorm };

// --------------------------------------------------------------------------------------
// Positional encodings: the values of each scheme for the positions in the list `at`

function learnedPosition(config, weights, at) {
  return { vectors: gather(weights.wpe.weight, at) };
}

function sinusoidalPosition(config, weights, at, engine) {
  const C = config.n_embd;
  const frequency = Float32Array.from({ length: C }, (_, i) => 10000 ** -Math.fround((i - (i % 2)) / C));
  const angle = (t, i) => Math.fround(t * frequency[i]);
  const sinusoid = (t, i) => (i % 2 === 0 ? Math.sin(angle(t, i)) : Math.cos(angle(t, i)));
  return { scale: Math.sqrt(C), vectors: engine.stacked(at.map((t) => frequency.map((_, i) => sinusoid(t, i)))) };
}

/** Angles are rounded to float32, as in training: at position 1,000 that is up to 0.00003 radians. */
function rotaryPosition(config, weights, at, engine) {
  const frequency = rotaryFrequencies(config);
  const known = (engine.rotary ??= []); // cos and sin of each position so far
  for (const t of at) known[t] ??= cosAndSin(frequency.map((f) => t * f));
  const [cos, sin] = [0, 1].map((i) => engine.stacked(at.map((t) => known[t][i])));
  return { frequency, cos, sin };
}

/** Both for the two halves of a head; in the first, sin has a minus sign. */
function cosAndSin(angles) {
  const [cos, sin] = [angles.map(Math.cos), angles.map(Math.sin)];
  return [Float32Array.from([...cos, ...cos]), Float32Array.from([...sin.map((x) => -x), ...sin])];
}

function headSize(config) {
  return config.head_size || config.n_embd / config.n_head;
}

function rotaryFrequencies(config) {
  const D = headSize(config);
  const frequency = Float32Array.from({ length: D / 2 }, (_, i) => config.rope_base ** -Math.fround((2 * i) / D));
  if (config.rope_factor === 1) return frequency;
  const { rope_low_freq_factor: low, rope_high_freq_factor: high } = config;
  return frequency.map((f) => {
    const turns = (config.rope_original_context * f) / (2 * Math.PI);
    const kept = Math.min(Math.max((turns - low) / (high - low), 0), 1); // fraction that is not divided
    return f * (kept + (1 - kept) / config.rope_factor);
  });
}

function alibiPosition(config) {
  return { slopes: Float32Array.from(alibiSlopes(config.n_head)) };
}

/** 2^(-8/n), 2^(-16/n), ... 2^-8 for n heads, a power of two; more heads take every other slope of 2n heads. */
function alibiSlopes(n_head) {
  const n = 2 ** Math.floor(Math.log2(n_head)); // the largest power of two that is not above n_head
  const slopes = Array.from({ length: n }, (_, i) => 2 ** ((-8 * (i + 1)) / n));
  const between = Array.from({ length: n }, (_, i) => 2 ** ((-4 * (2 * i + 1)) / n));
  return [...slopes, ...between.slice(0, n_head - n)];
}

const POSITIONS = {
  none: () => ({}),
  learned: learnedPosition,
  sinusoidal: sinusoidalPosition,
  rotary: rotaryPosition,
  alibi: alibiPosition,
};

// --------------------------------------------------------------------------------------
// Attention

/** The masks that are added to the scores: -Infinity for keys that a query must not see, and the bias of ALiBi.

The queries are at the positions in the list `at`, the keys at 0 to S - 1. Returns a mask, (T, S), for each head, or one
if it is the same for all; in a causal stack, row t ends with key t. */
function attentionMasks(engine, at, S, { causal, window, slopes }) {
  const limits = at.map((t) => (causal ? t + 1 : S));
  return Array.from(slopes ?? [0], (slope) => {
    const mask = Object.assign(engine.zeros(at.length, S), { limits });
    if (!window && !slope) return mask;
    const { data } = mask;
    at.forEach((t, row) => {
      for (let s = 0; s < limits[row]; s++) {
        const distance = Math.abs(t - s);
        data[row * S + s] = window && distance >= window ? -Infinity : slope && -slope * distance;
      }
    });
    return mask;
  });
}

/** Queries, keys and values of x, those that are named. With qk_norm, each head of queries and keys has an RMS norm. */
function project(x, weights, config, names) {
  const y = {};
  for (const name of names) {
    y[name] = y[`${name}_proj`] = linear(x, weights[`${name}_proj`]);
    if (name === "v" || !config.qk_norm) continue;
    const { output, scale } = standardize(y[name], headSize(config), FLOAT32_EPS);
    Object.assign(y, { [name]: output, [`${name}_norm`]: output, [`${name}_rms`]: scale });
  }
  return y;
}

/** x: (T, C), which follow the tokens of `before`, the trace of this function for them. */
function selfAttention(x, { attn: weights }, inputs, before) {
  const { config, position, mask, causal } = inputs;
  const y = project(x, weights, config, "qkv");
  if (position.cos) {
    y.q = rotate(y.q, position);
    y.k = rotate(y.k, position);
  }
  const [k, v] = [joined(before?.k, y.k), joined(before?.v, y.v)];
  Object.assign(y, attend(y.q, k, v, config.n_head, { masks: mask, causal }));
  y.o_proj = linear(y.heads, weights.o_proj);
  return y;
}

/** Queries come from one text, keys and values from another: inputs.context, (S, C), which is read once. */
function crossAttention(x, { cross_attn: weights }, inputs, before) {
  const { config } = inputs;
  const { engine } = x;
  const context = before?.context ?? project(engine.stacked(inputs.context), weights, config, "kv");
  const [k, v] = [context.k, context.v].map((rows) => (before ? engine.stacked(rows) : rows));
  const y = { ...project(x, weights, config, "q"), context };
  Object.assign(y, attend(y.q, k, v, config.n_head));
  y.o_proj = linear(y.heads, weights.o_proj);
  return y;
}

// --------------------------------------------------------------------------------------
// Feed-forward networks

/** Sum of 2^n x^(2n+1) / (1 3 5 ... (2n+1)), times 2 / sqrt(pi) e^(-x^2): all terms have the same sign. */
function erf(x) {
  if (Math.abs(x) > 5) return Math.sign(x); // to within 2e-12
  let [term, sum] = [x, x];
  for (let n = 1; Math.abs(term) > 1e-10 * Math.abs(sum); n++) {
    term *= (2 * x * x) / (2 * n + 1);
    sum += term;
  }
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
}

const SLOPE = Math.sqrt(2 / Math.PI);

/** Each function y of x, and its derivative by x. */
const ACTIVATIONS = {
  relu: [(x) => Math.max(x, 0), (x) => (x > 0 ? 1 : 0)],
  gelu: [
    (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
    (x) => 0.5 * (1 + erf(x * Math.SQRT1_2)) + (x * Math.exp((-x * x) / 2)) / Math.sqrt(2 * Math.PI),
  ],
  gelu_tanh: [
    (x) => 0.5 * x * (1 + Math.tanh(SLOPE * (x + 0.044715 * x ** 3))),
    (x) => {
      const tanh = Math.tanh(SLOPE * (x + 0.044715 * x ** 3));
      return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * SLOPE * (1 + 3 * 0.044715 * x * x);
    },
  ],
  silu: [(x) => x / (1 + Math.exp(-x)), (x, y) => y + (1 - y) / (1 + Math.exp(-x))],
  relu_squared: [(x) => (x > 0 ? x * x : 0), (x) => (x > 0 ? 2 * x : 0)],
};

function mlp(x, weights, config) {
  const up_proj = linear(x, weights.up_proj);
  const hidden = map(up_proj, ...ACTIVATIONS[config.activation]);
  return { up_proj, activation: hidden, hidden, down_proj: linear(hidden, weights.down_proj) };
}

function gatedMLP(x, weights, config) {
  const gate_proj = linear(x, weights.gate_proj);
  const up_proj = linear(x, weights.up_proj);
  const activation = map(gate_proj, ...ACTIVATIONS[config.activation]);
  const hidden = multiply(activation, up_proj);
  return { gate_proj, up_proj, activation, hidden, down_proj: linear(hidden, weights.down_proj) };
}

const MLPS = { plain: mlp, gated: gatedMLP, none: null };

const GAIN = 4; // CausalConv.GAIN

/** The convolution, if there is one, and the feed-forward network. x: (T, C). */
function feedForward(x, weights, { config }, before) {
  const conv = weights.conv ? causalConv(x, weights.conv.weight, GAIN, before?.input) : null;
  return { input: x, conv, ...MLPS[config.mlp](conv ?? x, weights.mlp, config) };
}

// --------------------------------------------------------------------------------------
// Blocks

/** {kind of block: whether a branch reads the norm of the stream, and whether what it computes is added to the stream} */
const BLOCKS = {
  pre_norm: { normFirst: true, residual: true },
  post_norm: { normFirst: false, residual: true },
  plain: { normFirst: true, residual: false },
};

/** [its name in those of norms and of the stream, of its weights, of its trace, and its function] */
const BRANCHES = [
  ["attn", "attn", "attn", selfAttention],
  ["cross", "cross_attn", "cross_attn", crossAttention],
  ["mlp", "mlp", "feed_forward", feedForward],
];

/** inputs: values that all blocks of a stack share. Returns the trace. */
function block(x, weights, inputs, before) {
  const { config, norm, dropout } = inputs;
  const { normFirst, residual } = BLOCKS[config.block];
  const y = { input: x };
  for (const [name, own, part, branch] of BRANCHES) {
    if (!weights[own]) continue;
    const normed = (stream) => (y[`${name}_norm`] = norm(stream, weights[`${name}_norm`])).output;
    y[part] = branch(normFirst ? normed(x) : x, weights, inputs, before?.[part]);
    const change = dropout(y[part].o_proj ?? y[part].down_proj, own);
    const stream = residual ? add(x, change) : change;
    x = y[`after_${name}`] = normFirst ? stream : normed(stream);
  }
  return { ...y, output: x };
}

/** x: (T, C), the embedded tokens, which follow those of `before`, the trace of this stack for them.

context: the rows, (S, C), for cross-attention. dropout(x, name): see forward(). */
function stack(x, weights, config, { causal, name, dropout, before = null, context = null }) {
  const first = before ? before.embed.length : 0;
  const S = first + x.rows;
  if (S > config.block_size) throw new RangeError(`${S} tokens, but block_size is ${config.block_size}`);
  const at = Array.from({ length: x.rows }, (_, t) => first + t);
  const { engine } = x;
  const position = POSITIONS[config.position](config, weights.position, at, engine);
  const mask = attentionMasks(engine, at, S, { causal, window: config.window, slopes: position.slopes });
  const embed = position.vectors ? add(x, position.vectors, position.scale) : x;
  const normBy = (kind) => (rows, layer) => NORMS[kind](rows, layer, config.norm_eps);
  const embed_norm = normBy(config.embed_norm ? config.norm : "none")(embed, weights.embed_norm);
  x = dropout(embed_norm.output, `${name}.embed`);
  const blocks = weights.blocks.map((each, i) => {
    const drop = (rows, branch) => dropout(rows, `${name}.blocks.${i}.${branch}`);
    const inputs = { config, norm: normBy(config.norm), position, mask, causal, context, dropout: drop };
    const y = block(x, each, inputs, before?.blocks[i]);
    x = y.output;
    return y;
  });
  const norm = normBy(config.block === "post_norm" ? "none" : config.norm)(x, weights.norm); // it ends with one
  return { position, embed, embed_norm, mask, blocks, norm };
}

// --------------------------------------------------------------------------------------
// Models. Each reads the new token ids, which follow those of `before`, and returns their trace up to the head.

/** Whether each token sees the past alone. The playground also trains models without the mask, to show why it is there. */
function isCausal(config) {
  return config.causal !== false;
}

function gpt({ weights, config }, idx, { before, dropout }) {
  const wte = gather(weights.wte.weight, idx);
  const options = { causal: isCausal(config), name: "stack", dropout, before: before?.stack };
  const y = stack(wte, weights.stack, config, options);
  return { idx, wte, stack: y, output: y.norm.output };
}

function transformer({ weights, config }, idx, { before, dropout, source }) {
  const wte = gather(weights.wte.weight, idx);
  const context = source.encoder.norm.output;
  const options = { causal: true, name: "decoder", dropout, before: before?.decoder, context };
  const y = stack(wte, weights.decoder, config, options);
  return { idx, wte, decoder: y, output: y.norm.output };
}

/** The trace of the source of a Transformer. */
function encode({ weights, config }, idx, dropout) {
  const wte = gather(weights.wte.weight, idx);
  const encoder = stack(wte, weights.encoder, config, { causal: false, name: "encoder", dropout });
  return { idx, wte, encoder };
}

const EMBEDDINGS = {
  table: ({ weights }, idx) => gather(weights.wte.weight, idx),
  number: ({ config, engine }, idx) => engine.stacked(idx.map((id) => [(id + 1) / config.vocab_size])),
};

/** The last `window` tokens side by side, the oldest first; zeros before the first token. */
function windowMLP(model, idx, { before, dropout }) {
  const { config, weights } = model;
  const wte = EMBEDDINGS[config.embedding](model, idx);
  const window = windows(wte, config.window, before?.wte);
  let x = window;
  const layers = weights.layers.map((layer, i) => {
    const y = linear(x, layer);
    const activation = map(y, ...ACTIVATIONS[config.activation]);
    x = dropout(activation, `layers.${i}`);
    return { linear: y, activation };
  });
  return { idx, wte, window, layers, output: x };
}

const MODELS = { window_mlp: windowMLP, gpt, transformer };

/** x: (T, C), the output of the stack. Returns (T, V). */
function head({ config, weights }, x) {
  const logits = linear(x, weights.lm_head);
  const cap = config.logit_soft_cap;
  if (!cap) return logits;
  return map(
    logits,
    (logit) => cap * Math.tanh(logit / cap),
    (logit) => 1 - Math.tanh(logit / cap) ** 2,
  );
}
