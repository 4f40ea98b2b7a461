"use strict";

/* The forward pass of every model that model.py can build, to be read beside it: the same parts, names and order.

Shapes: T target length, S source length (tokens attended to), C n_embd, H heads, D head size (C / n_head unless
head_size says otherwise), V vocabulary.

There is one text, not a batch of them. What is (T, C) in PyTorch is here a list of T rows, one for each token, each a
Float32Array of C features; sums are computed in double precision. The heads stand side by side in a row: feature i of
head h is row[h * D + i]. Scores and weights are lists of heads, each a list of T rows: weights[h][t][s].

forward() returns a trace, all that was computed on the way, under the names of model.py's modules and variables:

  idx                     T token ids
  wte                     (T, C)
  stack                   of a GPT; of a Transformer: decoder, and source = {idx, wte, encoder}
    position              learned: vectors (T, C); sinusoidal: vectors (T, C) and scale;
                          rotary: frequency (D / 2) and cos, sin (T, D); alibi: slopes (H)
    embed                 (T, C), with positions
    embed_norm            a norm
    mask                  (H or 1, T, S): added to the scores
    blocks[i]
      input               (T, C), the residual stream that enters
      attn_norm           a norm: input, output (T, C), and T numbers: mean and std of layernorm, rms of rmsnorm
      attn                q_proj, k_proj, v_proj; q_norm, k_norm with qk_norm; q, k (rotated, if they are) and v;
                          with qk_norm also q_rms, k_rms (T, H), by which q_norm and k_norm are divided;
                          scores = q k / sqrt(D) and weights (H, T, S); heads (T, H D), side by side; o_proj (T, C)
      after_attn          (T, C), the residual stream
      cross_norm, cross_attn, after_cross     the same of a decoder; context has k_proj, v_proj, k_norm, k, v: (S, ...)
      mlp_norm
      feed_forward        input; conv, where there is one; gate_proj of a gated network; up_proj;
                          activation: after it; hidden: activation, or times up_proj if gated; down_proj (T, C)
      after_mlp           (T, C)
      output              (T, C), what the next block reads
    norm                  a norm
  layers[i]               of a WindowMLP, instead of a stack: linear and activation; and window (T, window C), its input
  output                  (T, C), what the head reads
  logits                  (T, V)
  probs                   (T, tokenizer's V): a padded vocabulary has rows for which there are no tokens

In a block without a residual connection or in one with the norm after it, after_attn is what the next part reads.
In a causal stack, row t of mask, scores and weights ends with key t: later keys are masked, and not computed. So rows
depend on earlier tokens alone and are never changed once made, and a text whose first tokens are those of the text
before shares their rows with its trace. */

// --------------------------------------------------------------------------------------
// Rows

/** Rows of zeros of these lengths, side by side in one buffer: a buffer for each would cost more than the sums. */
function makeRows(lengths) {
  const all = new Float32Array(lengths.reduce((sum, length) => sum + length, 0));
  let from = 0;
  return lengths.map((length) => all.subarray(from, (from += length)));
}

const lengthsOf = (x) => x.map((row) => row.length);

/** Apply f to each number of each row. */
function mapRows(x, f) {
  const y = makeRows(lengthsOf(x));
  x.forEach((row, t) => {
    const made = y[t];
    for (let i = 0; i < row.length; i++) made[i] = f(row[i]);
  });
  return y;
}

/** Apply f to the numbers of two lists of rows, pair by pair. */
function zipRows(x, y, f) {
  const z = makeRows(lengthsOf(x));
  x.forEach((row, t) => {
    const [made, other] = [z[t], y[t]];
    for (let i = 0; i < row.length; i++) made[i] = f(row[i], other[i]);
  });
  return z;
}

function add(x, y) {
  return zipRows(x, y, (a, b) => a + b);
}

/** Row i of a matrix of weights. */
function rowOf({ data, shape }, i) {
  return data.slice(i * shape[1], (i + 1) * shape[1]);
}

/** x W^T + b. x: (T, inputs); weight: (outputs, inputs). Returns (T, outputs).

Four tokens at a time, so that each weight is read once for them. Every sum starts with the bias term and is in the
order of the inputs, so a row has the same bits whether it is computed by itself or with others. */
function linear(x, layer) {
  const y = makeRows(x.map(() => layer.weight.shape[0]));
  let t = 0;
  for (; t + 4 <= x.length; t += 4) multiplyFour(x.slice(t, t + 4), y.slice(t, t + 4), layer);
  for (; t < x.length; t++) multiplyOne(x[t], y[t], layer);
  return y;
}

/** Two outputs at a time, so that each input is read once for both. */
function multiplyFour([x0, x1, x2, x3], [y0, y1, y2, y3], { weight, bias }) {
  const { data, shape } = weight;
  const [outputs, inputs] = shape;
  for (let o = 0; o < outputs; o += 2) {
    const other = Math.min(o + 1, outputs - 1); // the last output again if their number is odd
    const [from, otherFrom] = [o * inputs, other * inputs];
    const [b, otherB] = bias ? [bias.data[o], bias.data[other]] : [0, 0];
    let [s0, s1, s2, s3, r0, r1, r2, r3] = [b, b, b, b, otherB, otherB, otherB, otherB];
    for (let i = 0; i < inputs; i++) {
      const w = data[from + i];
      const v = data[otherFrom + i];
      const a0 = x0[i];
      const a1 = x1[i];
      const a2 = x2[i];
      const a3 = x3[i];
      s0 += w * a0;
      s1 += w * a1;
      s2 += w * a2;
      s3 += w * a3;
      r0 += v * a0;
      r1 += v * a1;
      r2 += v * a2;
      r3 += v * a3;
    }
    [y0[o], y1[o], y2[o], y3[o]] = [s0, s1, s2, s3];
    [y0[other], y1[other], y2[other], y3[other]] = [r0, r1, r2, r3];
  }
}

/** Four outputs at a time, whose sums a processor computes side by side. */
function multiplyOne(x, y, { weight, bias }) {
  const { data, shape } = weight;
  const [outputs, inputs] = shape;
  const start = (o) => (bias ? bias.data[o] : 0);
  let o = 0;
  for (; o + 4 <= outputs; o += 4) {
    const [w0, w1, w2, w3] = [o * inputs, (o + 1) * inputs, (o + 2) * inputs, (o + 3) * inputs];
    let [s0, s1, s2, s3] = [start(o), start(o + 1), start(o + 2), start(o + 3)];
    for (let i = 0; i < inputs; i++) {
      s0 += data[w0 + i] * x[i];
      s1 += data[w1 + i] * x[i];
      s2 += data[w2 + i] * x[i];
      s3 += data[w3 + i] * x[i];
    }
    [y[o], y[o + 1], y[o + 2], y[o + 3]] = [s0, s1, s2, s3];
  }
  for (; o < outputs; o++) {
    let sum = start(o);
    for (let i = 0; i < inputs; i++) sum += data[o * inputs + i] * x[i];
    y[o] = sum;
  }
}

/** exp(x) / sum of exp(x), written to y. The largest x is subtracted first, which only prevents overflow. */
function softmax(x, y = new Float32Array(x.length), exp = new Float64Array(x.length)) {
  let [largest, sum] = [-Infinity, 0];
  for (let i = 0; i < x.length; i++) largest = Math.max(largest, x[i]);
  for (let i = 0; i < x.length; i++) sum += exp[i] = Math.exp(x[i] - largest);
  for (let i = 0; i < x.length; i++) y[i] = exp[i] / sum;
  return y;
}

// --------------------------------------------------------------------------------------
// Norms

const FLOAT32_EPS = 2 ** -23; // the default of F.rms_norm, which the norm of queries and keys uses

function layerNorm(x, { weight, bias }, eps) {
  const norm = { input: x, mean: [], std: [], output: makeRows(lengthsOf(x)) };
  x.forEach((row, t) => {
    const mean = meanOf(row);
    let variance = 0;
    for (let i = 0; i < row.length; i++) variance += (row[i] - mean) ** 2 / row.length;
    const std = Math.sqrt(variance + eps);
    norm.mean.push(mean);
    norm.std.push(std);
    const y = norm.output[t];
    for (let i = 0; i < y.length; i++) y[i] = ((row[i] - mean) / std) * weight.data[i] + (bias ? bias.data[i] : 0);
  });
  return norm;
}

function rmsNorm(x, { weight }, eps) {
  const norm = { input: x, rms: x.map((row) => rootMeanSquare(row, eps)), output: makeRows(lengthsOf(x)) };
  x.forEach((row, t) => {
    const y = norm.output[t];
    for (let i = 0; i < y.length; i++) y[i] = (row[i] / norm.rms[t]) * weight.data[i];
  });
  return norm;
}

function meanOf(row) {
  let sum = 0;
  for (let i = 0; i < row.length; i++) sum += row[i];
  return sum / row.length;
}

function rootMeanSquare(row, eps) {
  return Math.sqrt(dot(row, row) / row.length + eps);
}

function noNorm(x) {
  return { input: x, output: x };
}

const NORMS = { layernorm: layerNorm, rmsnorm: rmsNorm, none: noNorm };

// --------------------------------------------------------------------------------------
// Positional encodings: the values of each scheme for the positions in the list `at`

function learnedPosition(config, weights, at) {
  return { vectors: at.map((t) => rowOf(weights.wpe.weight, t)) };
}

function sinusoidalPosition(config, weights, at) {
  const C = config.n_embd;
  const frequency = Float32Array.from({ length: C }, (_, i) => 10000 ** -Math.fround((i - (i % 2)) / C));
  const angle = (t, i) => Math.fround(t * frequency[i]);
  const sinusoid = (t, i) => (i % 2 === 0 ? Math.sin(angle(t, i)) : Math.cos(angle(t, i)));
  return { scale: Math.sqrt(C), vectors: at.map((t) => frequency.map((_, i) => sinusoid(t, i))) };
}

/** Angles are rounded to float32, as in training: at position 1,000 that is up to 0.00003 radians. */
function rotaryPosition(config, weights, at) {
  const frequency = rotaryFrequencies(config);
  const angles = at.map((t) => frequency.map((f) => t * f));
  const cos = angles.map((row) => twice(row, Math.cos, Math.cos));
  const sin = angles.map((row) => twice(row, (angle) => -Math.sin(angle), Math.sin));
  return { frequency, cos, sin };
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

/** A row with f of all numbers, followed by g of all numbers. */
function twice(row, f, g) {
  return Float32Array.from([...row.map((value) => f(value)), ...row.map((value) => g(value))]);
}

/** (a, b) -> (a cos - b sin, b cos + a sin) for all pairs (i, i + D/2) of each head. x: (T, n D); cos, sin: (T, D). */
function rotate(x, { cos, sin }) {
  const D = cos[0].length;
  const y = makeRows(lengthsOf(x));
  x.forEach((row, t) => {
    const [made, c, s] = [y[t], cos[t], sin[t]];
    for (let from = 0; from < row.length; from += D) {
      for (let j = 0; j < D; j++) made[from + j] = row[from + j] * c[j] + row[from + ((j + D / 2) % D)] * s[j];
    }
  });
  return y;
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

/** x: (T, C), the token embeddings. Returns (T, C). */
function embedPositions(x, { vectors, scale = 1 }) {
  return vectors ? zipRows(x, vectors, (value, position) => value * scale + position) : x;
}

// --------------------------------------------------------------------------------------
// Attention

/** The mask that is added to the scores: -Infinity for keys that a query must not see, and the bias of ALiBi.

The queries are at the positions in the list `at`, the keys at 0 to S - 1. Returns (H, T, S), or (1, T, S) where it is
the same for all heads; in a causal stack, row t ends with key t. */
function attentionMask(at, S, { causal, window, slopes }) {
  return Array.from(slopes ?? [0], (slope) => {
    const mask = makeRows(at.map((t) => (causal ? t + 1 : S)));
    at.forEach((t, row) => {
      for (let s = 0; s < mask[row].length; s++) {
        const distance = Math.abs(t - s);
        mask[row][s] = window && distance >= window ? -Infinity : slope && -slope * distance;
      }
    });
    return mask;
  });
}

/** softmax(q k^T / sqrt(D) + mask) v. q: (T, H D); k, v: the same for S tokens, or narrower if groups of neighbouring
heads share one. */
function attend(q, k, v, mask, n_head) {
  const D = q[0].length / n_head;
  const group = q[0].length / k[0].length; // heads that share one head of keys and values
  const y = { scores: [], weights: [], heads: makeRows(lengthsOf(q)) };
  const [exp, sums] = [new Float64Array(k.length), new Float64Array(D)];
  for (let h = 0; h < n_head; h++) {
    const from = Math.floor(h / group) * D; // where their keys and values begin in a row
    const bias = mask && mask[h % mask.length];
    const scores = makeRows(q.map((_, t) => (bias ? bias[t].length : k.length)));
    q.forEach((row, t) => scoreKeys(row.subarray(h * D, (h + 1) * D), k, from, scores[t]));
    const weights = bias ? add(scores, bias) : mapRows(scores, (score) => score);
    weights.forEach((row, t) => {
      softmax(row, row, exp);
      y.heads[t].set(weightedMean(row, v, from, sums), h * D);
    });
    y.scores.push(scores);
    y.weights.push(weights);
  }
  return y;
}

/** The scores of one query, (D,), with the first keys, as many as there are scores. Features begin at `from`. */
function scoreKeys(q, k, from, scores) {
  const scale = Math.sqrt(q.length);
  let s = 0;
  for (; s + 2 <= scores.length; s += 2) {
    const [a, b] = [k[s], k[s + 1]];
    let sum = 0;
    let other = 0; // side by side
    for (let i = 0; i < q.length; i++) {
      sum += q[i] * a[from + i];
      other += q[i] * b[from + i];
    }
    scores[s] = sum / scale;
    scores[s + 1] = other / scale;
  }
  for (; s < scores.length; s++) scores[s] = dot(q, k[s], from) / scale;
}

function dot(x, y, from = 0) {
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i] * y[from + i];
  return sum;
}

/** sums: the output, in double precision. */
function weightedMean(weights, v, from, sums) {
  sums.fill(0);
  for (let s = 0; s < weights.length; s++) {
    const weight = weights[s];
    const row = v[s];
    for (let i = 0; i < sums.length; i++) sums[i] += weight * row[from + i];
  }
  return sums;
}

function queries(x, weights, config) {
  const q_proj = linear(x, weights.q_proj);
  if (!config.qk_norm) return { q_proj, q: q_proj };
  const [q_norm, q_rms] = normHeads(q_proj, config);
  return { q_proj, q_rms, q_norm, q: q_norm };
}

function keysAndValues(x, weights, config) {
  const k_proj = linear(x, weights.k_proj);
  const v_proj = linear(x, weights.v_proj);
  if (!config.qk_norm) return { k_proj, v_proj, k: k_proj, v: v_proj };
  const [k_norm, k_rms] = normHeads(k_proj, config);
  return { k_proj, v_proj, k_rms, k_norm, k: k_norm, v: v_proj };
}

/** qk_norm: the RMS norm of each head, without a trained scale, and the root mean squares, (T, H). */
function normHeads(x, config) {
  const D = headSize(config);
  const y = makeRows(lengthsOf(x));
  const rms = makeRows(x.map((row) => row.length / D));
  x.forEach((row, t) => {
    for (let from = 0; from < row.length; from += D) {
      const head = row.subarray(from, from + D);
      const root = (rms[t][from / D] = rootMeanSquare(head, FLOAT32_EPS));
      for (let i = 0; i < D; i++) y[t][from + i] = head[i] / root;
    }
  });
  return [y, rms];
}

/** x: (T, C), which follow the tokens of `before`, the trace of this function for them. */
function selfAttention(x, weights, inputs, before) {
  const { config, position, mask } = inputs;
  const y = { ...queries(x, weights, config), ...keysAndValues(x, weights, config) };
  if (position.cos) {
    y.q = rotate(y.q, position);
    y.k = rotate(y.k, position);
  }
  const [k, v] = [joined(before?.k, y.k), joined(before?.v, y.v)];
  Object.assign(y, attend(y.q, k, v, mask, config.n_head));
  y.o_proj = linear(y.heads, weights.o_proj);
  return y;
}

/** Queries come from one text, keys and values from another: inputs.context, (S, C), which is read once. */
function crossAttention(x, weights, inputs, before) {
  const { config } = inputs;
  const context = before?.context ?? keysAndValues(inputs.context, weights, config);
  const y = { ...queries(x, weights, config), context };
  Object.assign(y, attend(y.q, context.k, context.v, null, config.n_head));
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

const ACTIVATIONS = {
  relu: (x) => Math.max(x, 0),
  gelu: (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
  gelu_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  silu: (x) => x / (1 + Math.exp(-x)),
  relu_squared: (x) => Math.max(x, 0) ** 2,
};

function mlp(x, weights, config) {
  const up_proj = linear(x, weights.up_proj);
  const hidden = mapRows(up_proj, ACTIVATIONS[config.activation]);
  return { up_proj, activation: hidden, hidden, down_proj: linear(hidden, weights.down_proj) };
}

function gatedMLP(x, weights, config) {
  const gate_proj = linear(x, weights.gate_proj);
  const up_proj = linear(x, weights.up_proj);
  const activation = mapRows(gate_proj, ACTIVATIONS[config.activation]);
  const hidden = zipRows(activation, up_proj, (gate, value) => gate * value);
  return { gate_proj, up_proj, activation, hidden, down_proj: linear(hidden, weights.down_proj) };
}

const MLPS = { plain: mlp, gated: gatedMLP, none: null };

const GAIN = 4; // CausalConv.GAIN

/** x_t + w_1 x_(t-1) + w_2 x_(t-2) + ...; before: the rows that come before x. weight: (n, C). */
function causalConv(x, { weight }, before) {
  const text = joined(before, x);
  const [n, C] = weight.shape;
  return x.map((row, number) => {
    const t = text.length - x.length + number;
    const y = Float64Array.from(row);
    for (let back = 1; back <= Math.min(n, t); back++) {
      for (let i = 0; i < C; i++) y[i] += GAIN * weight.data[(back - 1) * C + i] * text[t - back][i];
    }
    return Float32Array.from(y);
  });
}

// --------------------------------------------------------------------------------------
// Blocks. Each returns its trace. inputs: values that all blocks of a stack share.

/** The convolution, if there is one, and the feed-forward network. x: (T, C). */
function feedForward(x, weights, { config }, before) {
  const conv = weights.conv ? causalConv(x, weights.conv, before?.input) : null;
  return { input: x, conv, ...MLPS[config.mlp](conv ?? x, weights.mlp, config) };
}

function preNormBlock(x, weights, inputs, before) {
  const { norm, dropout } = inputs;
  const y = { input: x };
  y.attn_norm = norm(x, weights.attn_norm);
  y.attn = selfAttention(y.attn_norm.output, weights.attn, inputs, before?.attn);
  x = y.after_attn = add(x, dropout(y.attn.o_proj, "attn"));
  if (weights.cross_attn) {
    y.cross_norm = norm(x, weights.cross_norm);
    y.cross_attn = crossAttention(y.cross_norm.output, weights.cross_attn, inputs, before?.cross_attn);
    x = y.after_cross = add(x, dropout(y.cross_attn.o_proj, "cross_attn"));
  }
  if (weights.mlp) {
    y.mlp_norm = norm(x, weights.mlp_norm);
    y.feed_forward = feedForward(y.mlp_norm.output, weights, inputs, before?.feed_forward);
    x = y.after_mlp = add(x, dropout(y.feed_forward.down_proj, "mlp"));
  }
  return { ...y, output: x };
}

function postNormBlock(x, weights, inputs, before) {
  const { norm, dropout } = inputs;
  const y = { input: x };
  y.attn = selfAttention(x, weights.attn, inputs, before?.attn);
  y.attn_norm = norm(add(x, dropout(y.attn.o_proj, "attn")), weights.attn_norm);
  x = y.after_attn = y.attn_norm.output;
  if (weights.cross_attn) {
    y.cross_attn = crossAttention(x, weights.cross_attn, inputs, before?.cross_attn);
    y.cross_norm = norm(add(x, dropout(y.cross_attn.o_proj, "cross_attn")), weights.cross_norm);
    x = y.after_cross = y.cross_norm.output;
  }
  if (weights.mlp) {
    y.feed_forward = feedForward(x, weights, inputs, before?.feed_forward);
    y.mlp_norm = norm(add(x, dropout(y.feed_forward.down_proj, "mlp")), weights.mlp_norm);
    x = y.after_mlp = y.mlp_norm.output;
  }
  return { ...y, output: x };
}

function plainBlock(x, weights, inputs, before) {
  const { norm, dropout } = inputs;
  const y = { input: x };
  y.attn_norm = norm(x, weights.attn_norm);
  y.attn = selfAttention(y.attn_norm.output, weights.attn, inputs, before?.attn);
  x = y.after_attn = dropout(y.attn.o_proj, "attn");
  if (weights.cross_attn) {
    y.cross_norm = norm(x, weights.cross_norm);
    y.cross_attn = crossAttention(y.cross_norm.output, weights.cross_attn, inputs, before?.cross_attn);
    x = y.after_cross = dropout(y.cross_attn.o_proj, "cross_attn");
  }
  if (weights.mlp) {
    y.mlp_norm = norm(x, weights.mlp_norm);
    y.feed_forward = feedForward(y.mlp_norm.output, weights, inputs, before?.feed_forward);
    x = y.after_mlp = dropout(y.feed_forward.down_proj, "mlp");
  }
  return { ...y, output: x };
}

function parallelBlock(x, weights, inputs, before) {
  const { norm, dropout } = inputs;
  const y = { input: x, attn_norm: norm(x, weights.attn_norm) };
  const normed = y.attn_norm.output;
  y.attn = selfAttention(normed, weights.attn, inputs, before?.attn);
  x = y.after_attn = add(x, dropout(y.attn.o_proj, "attn"));
  if (weights.cross_attn) {
    y.cross_attn = crossAttention(normed, weights.cross_attn, inputs, before?.cross_attn);
    x = y.after_cross = add(x, dropout(y.cross_attn.o_proj, "cross_attn"));
  }
  y.feed_forward = feedForward(normed, weights, inputs, before?.feed_forward);
  x = y.after_mlp = add(x, dropout(y.feed_forward.down_proj, "mlp"));
  return { ...y, output: x };
}

const BLOCKS = { pre_norm: preNormBlock, post_norm: postNormBlock, plain: plainBlock, parallel: parallelBlock };

/** x: (T, C), embedded tokens, which follow those of `before`, the trace of this stack for them.

context: (S, C), for cross-attention. dropout(rows, name): see forward(). */
function stack(x, weights, config, { causal, name, dropout, before = null, context = null }) {
  const first = before ? before.embed.length : 0;
  const S = first + x.length;
  if (S > config.block_size) throw new RangeError(`${S} tokens, but block_size is ${config.block_size}`);
  const at = x.map((_, t) => first + t);
  const position = POSITIONS[config.position](config, weights.position, at);
  const mask = attentionMask(at, S, { causal, window: config.window, slopes: position.slopes });
  const embed = embedPositions(x, position);
  const normBy = (kind) => (rows, layer) => NORMS[kind](rows, layer, config.norm_eps);
  const embed_norm = normBy(config.embed_norm ? config.norm : "none")(embed, weights.embed_norm);
  x = dropout(embed_norm.output, `${name}.embed`);
  const blocks = weights.blocks.map((block, i) => {
    const drop = (rows, branch) => dropout(rows, `${name}.blocks.${i}.${branch}`);
    const inputs = { config, norm: normBy(config.norm), position, mask, context, dropout: drop };
    const y = BLOCKS[config.block](x, block, inputs, before?.blocks[i]);
    x = y.output;
    return y;
  });
  const norm = normBy(config.block === "post_norm" ? "none" : config.norm)(x, weights.norm); // it ends with one
  return { position, embed, embed_norm, mask, blocks, norm };
}

// --------------------------------------------------------------------------------------
// Embeddings

function embedTokens({ weights }, idx) {
  return idx.map((id) => rowOf(weights.wte.weight, id));
}

// --------------------------------------------------------------------------------------
// Models. Each reads the new token ids, which follow those of `before`, and returns their trace up to the head.

function gpt(model, idx, { before, dropout }) {
  const wte = embedTokens(model, idx);
  const options = { causal: true, name: "stack", dropout, before: before?.stack };
  const y = stack(wte, model.weights.stack, model.config, options);
  return { idx, wte, stack: y, output: y.norm.output };
}

function transformer(model, idx, { before, dropout, source }) {
  const wte = embedTokens(model, idx);
  const context = source.encoder.norm.output;
  const options = { causal: true, name: "decoder", dropout, before: before?.decoder, context };
  const y = stack(wte, model.weights.decoder, model.config, options);
  return { idx, wte, decoder: y, output: y.norm.output };
}

/** The trace of the source of a Transformer. */
function encode(model, idx, dropout) {
  const wte = embedTokens(model, idx);
  const encoder = stack(wte, model.weights.encoder, model.config, { causal: false, name: "encoder", dropout });
  return { idx, wte, encoder };
}

const EMBEDDINGS = {
  table: ({ weights }, id) => rowOf(weights.wte.weight, id),
  number: ({ config }, id) => Float32Array.of((id + 1) / config.vocab_size),
};

/** The last `window` tokens side by side, the oldest first; zeros before the first token. */
function windowMLP(model, idx, { before, dropout }) {
  const { config, weights } = model;
  const wte = idx.map((id) => EMBEDDINGS[config.embedding](model, id));
  const text = joined(before?.wte, wte);
  const window = wte.map((_, number) => {
    const row = new Float32Array(config.window * config.n_embd);
    const end = text.length - wte.length + number + 1;
    const seen = text.slice(Math.max(end - config.window, 0), end);
    seen.forEach((vector, i) => row.set(vector, (config.window - seen.length + i) * config.n_embd));
    return row;
  });
  let x = window;
  const layers = weights.layers.map((layer, i) => {
    const y = linear(x, layer);
    const activation = mapRows(y, ACTIVATIONS[config.activation]);
    x = dropout(activation, `layers.${i}`);
    return { linear: y, activation };
  });
  return { idx, wte, window, layers, output: x };
}

const MODELS = { window_mlp: windowMLP, gpt, transformer };

/** x: (T, C), the output of the stack, or of any block after the last norm, to see its prediction. Returns (T, V). */
function head({ config, weights }, x) {
  const logits = linear(x, weights.lm_head);
  const cap = config.logit_soft_cap;
  return cap ? mapRows(logits, (logit) => cap * Math.tanh(logit / cap)) : logits;
}

/** The probabilities of the tokenizer's tokens from one row of logits. */
function probabilities(model, logits) {
  return softmax(logits.subarray(0, model.tokenizer_vocab_size));
}

/** The trace of a text, as described above.

model: {config, weights: by their names in the state dict, tokenizer_vocab_size}. idx: T token ids, at
most block_size. source: those of the text that a Transformer translates. before: the trace of an earlier text, which is
not changed; the first tokens that the two have in common are not computed again, and trace.first is their number.
lastOnly: logits and probs of the last token alone, null for the others, since a large vocabulary takes long.
dropout(rows, name): what an embedding or a branch becomes, as by dropout in training; a trace that was made with one is
of no use as `before`. */
function forward(model, idx, { source = null, before = null, lastOnly = false, dropout = (rows) => rows } = {}) {
  if (before && !sameIds(source ?? [], before.source?.idx ?? [])) before = null;
  const { source: encoded = source && encode(model, source, dropout), logits, probs, ...rest } = before ?? {};
  const first = before ? commonLength(idx, before.idx) : 0;
  let trace = first ? firstTokens(rest, first) : null;
  if (first < idx.length) {
    const read = MODELS[model.config.model];
    trace = appendTokens(trace, read(model, idx.slice(first), { before: trace, dropout, source: encoded }));
  }
  if (encoded) trace.source = encoded;
  return { ...trace, ...predict(model, trace.output, { logits, probs, first, lastOnly }), first };
}

/** logits and probs of the tokens from `first` on, or only of the last one. The rows before it stay as they were. */
function predict(model, output, { logits, probs, first, lastOnly }) {
  const kept = (rows) => output.map((_, t) => (t < first ? rows[t] : null));
  const y = { logits: kept(logits), probs: kept(probs) };
  const wanted = lastOnly ? [output.length - 1] : [...output.keys()];
  const missing = wanted.filter((t) => !y.logits[t]);
  head(
    model,
    missing.map((t) => output[t]),
  ).forEach((row, i) => {
    y.logits[missing[i]] = row;
    y.probs[missing[i]] = probabilities(model, row);
  });
  return y;
}

// --------------------------------------------------------------------------------------
// Traces of the beginning of a text, and of its continuation

function commonLength(a, b) {
  const different = a.findIndex((id, t) => id !== b[t]);
  return different < 0 ? a.length : different;
}

function sameIds(a, b) {
  return a.length === b.length && commonLength(a, b) === a.length;
}

function joined(before, x) {
  return before ? before.concat(x) : x;
}

/** Whether a list has an entry for each token. Otherwise it is a list of blocks, heads or layers. */
function isRows(value) {
  return Array.isArray(value) && (ArrayBuffer.isView(value[0]) || typeof value[0] === "number");
}

/** The trace of a text's first n tokens. The context, which cross-attention reads, belongs to no single token. */
function firstTokens(trace, n) {
  return mapTrace(trace, (value) => value.slice(0, n));
}

/** The trace of two texts, one after the other. before: null if there is no first text. */
function appendTokens(before, trace) {
  return before ? mapTrace(trace, (value, earlier) => earlier.concat(value), before) : trace;
}

/** Replace each list of rows in a trace by f(rows, the other trace's rows). */
function mapTrace(trace, f, other) {
  if (isRows(trace)) return f(trace, other);
  if (Array.isArray(trace)) return trace.map((value, i) => mapTrace(value, f, other?.[i]));
  if (trace === null || typeof trace !== "object" || ArrayBuffer.isView(trace)) return trace;
  const entries = Object.entries(trace);
  return Object.fromEntries(
    entries.map(([key, value]) => [key, key === "context" ? value : mapTrace(value, f, other?.[key])]),
  );
}

if (typeof module !== "undefined") {
  const dictionaries = { NORMS, POSITIONS, ACTIVATIONS, MLPS, BLOCKS, EMBEDDINGS, MODELS };
  const rows = { add, dot, lengthsOf, linear, makeRows, mapRows, rowOf, zipRows };
  const helpers = { FLOAT32_EPS, GAIN, erf, headSize, rootMeanSquare, rotate };
  module.exports = { ...dictionaries, ...rows, ...helpers, forward, head, probabilities, softmax };
}
