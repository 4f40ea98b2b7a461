"use strict";

/* The backward pass, to be read beside model.js, and a step of gradient descent.

Each function goes backward through the function of model.js with the same name: it is given dy,
the derivative of the loss by each number of the output, and returns

  dx         the derivative by each number of the input, of its shape
  gradient   the derivative by each weight, under the weights' names

all by the chain rule. y is the trace of the forward pass, shapes are those of model.js, and nothing that is given is
changed. A step makes a new model: whoever keeps the old one can undo it. */

/** The reason why such a model has no backward pass, in a sentence for the reader; null if it has one. */
function missingBackward({ model, block }) {
  if (model !== "gpt") {
    const what = model === "transformer" ? "through an encoder and cross-attention" : "through a window of tokens";
    return `This page trains models with model=gpt alone: it has no backward pass ${what}.`;
  }
  if (block !== "pre_norm") {
    return `This page trains blocks of the kind pre_norm alone: it has no backward pass for block=${block}.`;
  }
  return null;
}

function zeros({ shape, data }) {
  return { shape, data: new Float32Array(data.length) };
}

/** A layer's gradient, filled with zeros. */
function zeroGradient({ weight, bias }) {
  return bias ? { weight: zeros(weight), bias: zeros(bias) } : { weight: zeros(weight) };
}

function zeroRows(x) {
  return makeRows(lengthsOf(x));
}

// --------------------------------------------------------------------------------------
// Loss

/** -ln of the probability of each next token, in nats: T - 1 of them. The rows of a padded vocabulary take part in
the sum of softmax, as in training. */
function tokenLosses({ idx, logits }) {
  return idx.slice(1).map((id, t) => crossEntropy(logits[t], id));
}

function crossEntropy(logits, id) {
  let [largest, sum] = [-Infinity, 0];
  for (const logit of logits) largest = Math.max(largest, logit);
  for (const logit of logits) sum += Math.exp(logit - largest);
  return largest + Math.log(sum) - logits[id];
}

/** The derivative of the mean loss: (softmax - 1 at the true token) / (T - 1). The last token predicts nothing. */
function tokenLossesBackward({ idx, logits }) {
  return logits.map((row, t) => {
    if (t === idx.length - 1) return new Float32Array(row.length);
    const dx = softmax(row);
    dx[idx[t + 1]] -= 1;
    return dx.map((value) => value / (idx.length - 1));
  });
}

// --------------------------------------------------------------------------------------
// Linear layers and norms

/** y = x W^T + b: dx = dy W, and dW = dy^T x, the sum over tokens of dy times the input that the weight multiplied. */
function linearBackward(dy, x, { weight, bias }) {
  const dx = linear(dy, { weight: stacked(columns(rowsOf(weight))) });
  const gradient = { weight: stacked(linear(columns(dy), { weight: stacked(columns(x)) })) };
  if (bias) gradient.bias = { shape: bias.shape, data: Float32Array.from(columns(dy), sumOf) };
  return { dx, gradient };
}

function rowsOf(matrix) {
  return Array.from({ length: matrix.shape[0] }, (_, i) => rowOf(matrix, i));
}

/** (T, C) -> (C, T) */
function columns(rows) {
  const y = makeRows(Array.from(rows[0], () => rows.length));
  rows.forEach((row, t) => row.forEach((value, i) => (y[i][t] = value)));
  return y;
}

/** The matrix of these rows. */
function stacked(rows) {
  const [n, C] = [rows.length, rows[0].length];
  const data = new Float32Array(n * C);
  rows.forEach((row, i) => data.set(row, i * C));
  return { shape: [n, C], data };
}

function sumOf(row) {
  return row.reduce((sum, value) => sum + value, 0);
}

/** y = n w + b, where n is x without its mean, of layernorm, divided by std or rms. */
function normBackward(dy, { input, mean, std, rms }, layer) {
  if (!std && !rms) return { dx: dy };
  const gradient = zeroGradient(layer);
  const dx = dy.map((row, t) => {
    const scale = std ? std[t] : rms[t];
    const normed = input[t].map((x) => (x - (mean ? mean[t] : 0)) / scale);
    row.forEach((d, i) => {
      gradient.weight.data[i] += d * normed[i];
      if (gradient.bias) gradient.bias.data[i] += d;
    });
    return divideBackward(row.map((d, i) => d * layer.weight.data[i]), normed, scale, Boolean(mean));
  });
  return { dx, gradient };
}

/** n = x / rms, or (x - mean) / std if centred. Each number of x also changes mean and scale, and through them all of
n. d: the derivative by n. */
function divideBackward(d, normed, scale, centred) {
  const n = d.length;
  const byMean = centred ? sumOf(d) / n : 0;
  const byScale = dot(d, normed) / n;
  return d.map((value, i) => (value - byMean - normed[i] * byScale) / scale);
}

/** The norm of queries or keys, qk_norm. x: (T, H D). */
function normHeadsBackward(dy, x, config) {
  const D = headSize(config);
  return dy.map((row, t) => {
    const dx = new Float32Array(row.length);
    for (let from = 0; from < row.length; from += D) {
      const head = x[t].subarray(from, from + D);
      const rms = rootMeanSquare(head, FLOAT32_EPS);
      const normed = head.map((value) => value / rms);
      dx.set(divideBackward(row.subarray(from, from + D), normed, rms, false), from);
    }
    return dx;
  });
}

// --------------------------------------------------------------------------------------
// Attention

/** Rotate the derivative back by the angle of the forward pass. */
function rotateBackward(dy, { cos, sin }) {
  return rotate(dy, { cos, sin: mapRows(sin, (value) => -value) });
}

/** heads = weights v, weights = softmax(q k^T / sqrt(D) + mask). dy: (T, H D). Returns dq, dk and dv.

The sums of softmax are 1, so a score changes the output only as far as its value differs from the mean: the
derivative by it is weight (dweight - mean of dweight). */
function attendBackward(dy, { q, k, v, weights }, n_head) {
  const D = q[0].length / n_head;
  const group = q[0].length / k[0].length; // heads that share one head of keys and values
  const [dq, dk, dv] = [q, k, v].map(zeroRows);
  for (let h = 0; h < n_head; h++) {
    const from = Math.floor(h / group) * D; // where their keys and values begin in a row
    for (let t = 0; t < q.length; t++) {
      const [query, dquery, own] = [q, dq, dy].map((rows) => rows[t].subarray(h * D, (h + 1) * D));
      const row = weights[h][t];
      const dweights = row.map((_, s) => dot(own, v[s], from));
      const mean = dot(row, dweights);
      for (let s = 0; s < row.length; s++) {
        const dscore = (row[s] * (dweights[s] - mean)) / Math.sqrt(D);
        addScaled(dv[s], from, row[s], own, 0, D);
        addScaled(dk[s], from, dscore, query, 0, D);
        addScaled(dquery, 0, dscore, k[s], from, D);
      }
    }
  }
  return [dq, dk, dv];
}

/** Add a times n numbers of x, starting at `from`, to the numbers of y that start at `at`. */
function addScaled(y, at, a, x, from, n) {
  for (let i = 0; i < n; i++) y[at + i] += a * x[from + i];
}

/** x: (T, C), what attention read. */
function selfAttentionBackward(dy, y, x, weights, { config, position }) {
  const o_proj = linearBackward(dy, y.heads, weights.o_proj);
  let [dq, dk, dv] = attendBackward(o_proj.dx, y, config.n_head);
  if (position.cos) [dq, dk] = [rotateBackward(dq, position), rotateBackward(dk, position)];
  if (config.qk_norm) {
    dq = normHeadsBackward(dq, y.q_proj, config);
    dk = normHeadsBackward(dk, y.k_proj, config);
  }
  const q_proj = linearBackward(dq, x, weights.q_proj);
  const k_proj = linearBackward(dk, x, weights.k_proj);
  const v_proj = linearBackward(dv, x, weights.v_proj);
  return {
    dx: add(add(q_proj.dx, k_proj.dx), v_proj.dx),
    gradient: gradientsOf({ q_proj, k_proj, v_proj, o_proj }),
  };
}

/** {name: result of a backward function} -> {name: its gradient}, without the parts that have no weights. */
function gradientsOf(parts) {
  const entries = Object.entries(parts).filter(([, part]) => part?.gradient);
  return Object.fromEntries(entries.map(([name, part]) => [name, part.gradient]));
}

// --------------------------------------------------------------------------------------
// Feed-forward networks

const SLOPE = Math.sqrt(2 / Math.PI); // a constant of gelu_tanh

/** The derivatives of ACTIVATIONS. */
const ACTIVATIONS_BACKWARD = {
  relu: (x) => (x > 0 ? 1 : 0),
  gelu: (x) => 0.5 * (1 + erf(x * Math.SQRT1_2)) + (x * Math.exp((-x * x) / 2)) / Math.sqrt(2 * Math.PI),
  gelu_tanh(x) {
    const tanh = Math.tanh(SLOPE * (x + 0.044715 * x ** 3));
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * SLOPE * (1 + 3 * 0.044715 * x * x);
  },
  silu(x) {
    const sigmoid = 1 / (1 + Math.exp(-x));
    return sigmoid * (1 + x * (1 - sigmoid));
  },
  relu_squared: (x) => 2 * Math.max(x, 0),
};

/** x: (T, C), what the network read. */
function mlpBackward(dy, y, x, weights, config) {
  const slope = ACTIVATIONS_BACKWARD[config.activation];
  const down_proj = linearBackward(dy, y.hidden, weights.down_proj);
  const dup = zipRows(down_proj.dx, y.up_proj, (d, value) => d * slope(value));
  const up_proj = linearBackward(dup, x, weights.up_proj);
  return { dx: up_proj.dx, gradient: gradientsOf({ up_proj, down_proj }) };
}

function gatedMLPBackward(dy, y, x, weights, config) {
  const slope = ACTIVATIONS_BACKWARD[config.activation];
  const down_proj = linearBackward(dy, y.hidden, weights.down_proj);
  const dup = zipRows(down_proj.dx, y.activation, (d, gate) => d * gate);
  const dactivation = zipRows(down_proj.dx, y.up_proj, (d, value) => d * value);
  const dgate = zipRows(dactivation, y.gate_proj, (d, value) => d * slope(value));
  const gate_proj = linearBackward(dgate, x, weights.gate_proj);
  const up_proj = linearBackward(dup, x, weights.up_proj);
  return { dx: add(gate_proj.dx, up_proj.dx), gradient: gradientsOf({ gate_proj, up_proj, down_proj }) };
}

const MLPS_BACKWARD = { plain: mlpBackward, gated: gatedMLPBackward };

/** y_t = x_t + w_1 x_(t-1) + ...: a token takes part in its own output and in the outputs of the next few tokens. */
function causalConvBackward(dy, x, { weight }) {
  const [n, C] = weight.shape;
  const gradient = { weight: zeros(weight) };
  const dx = dy.map((row) => row.slice());
  for (let t = 0; t < x.length; t++) {
    for (let back = 1; back <= Math.min(n, t); back++) {
      for (let i = 0, at = (back - 1) * C; i < C; i++, at++) {
        dx[t - back][i] += GAIN * weight.data[at] * dy[t][i];
        gradient.weight.data[at] += GAIN * x[t - back][i] * dy[t][i];
      }
    }
  }
  return { dx, gradient };
}

// --------------------------------------------------------------------------------------
// Block and stack

/** The residual stream is only added to, so its derivative passes unchanged, and each branch adds its own. */
function preNormBlockBackward(dy, y, weights, inputs) {
  const { config } = inputs;
  let conv, mlp, mlp_norm;
  if (weights.mlp) {
    const { input, conv: convolved } = y.feed_forward;
    mlp = MLPS_BACKWARD[config.mlp](dy, y.feed_forward, convolved ?? input, weights.mlp, config);
    conv = weights.conv && causalConvBackward(mlp.dx, input, weights.conv);
    mlp_norm = normBackward((conv ?? mlp).dx, y.mlp_norm, weights.mlp_norm);
    dy = add(dy, mlp_norm.dx);
  }
  const attn = selfAttentionBackward(dy, y.attn, y.attn_norm.output, weights.attn, inputs);
  const attn_norm = normBackward(attn.dx, y.attn_norm, weights.attn_norm);
  return { dx: add(dy, attn_norm.dx), gradient: gradientsOf({ attn_norm, attn, mlp_norm, conv, mlp }) };
}

function stackBackward(dy, y, weights, config) {
  const norm = normBackward(dy, y.norm, weights.norm);
  let dx = norm.dx;
  const blocks = { gradient: [] };
  for (let i = y.blocks.length - 1; i >= 0; i--) {
    const block = preNormBlockBackward(dx, y.blocks[i], weights.blocks[i], { config, position: y.position });
    blocks.gradient[i] = block.gradient;
    dx = block.dx;
  }
  const embed_norm = normBackward(dx, y.embed_norm, weights.embed_norm);
  const position = weights.position && learnedPositionBackward(embed_norm.dx, weights.position);
  const scale = y.position.scale ?? 1;
  dx = mapRows(embed_norm.dx, (d) => d * scale);
  return { dx, gradient: gradientsOf({ position, embed_norm, blocks, norm }) };
}

function learnedPositionBackward(dy, { wpe }) {
  return { gradient: { wpe: tableGradient(dy, [...dy.keys()], wpe) } };
}

/** The gradient of a table from which each token has read a row. */
function tableGradient(dy, rows, { weight }) {
  const gradient = { weight: zeros(weight) };
  const C = weight.shape[1];
  dy.forEach((row, t) => row.forEach((d, i) => (gradient.weight.data[rows[t] * C + i] += d)));
  return gradient;
}

// --------------------------------------------------------------------------------------
// The model

/** Mean loss of a text of at least two tokens, the loss of each, and the derivative of the mean by each weight.

trace: of forward(), with the logits of all tokens and without dropout. A model with missingBackward() has none. */
function lossAndGradient({ config, weights }, trace) {
  const losses = tokenLosses(trace);
  const loss = sumOf(losses) / losses.length;
  const cap = config.logit_soft_cap;
  let dlogits = tokenLossesBackward(trace);
  if (cap) dlogits = zipRows(dlogits, trace.logits, (d, logit) => d * (1 - (logit / cap) ** 2));
  const lm_head = linearBackward(dlogits, trace.output, weights.lm_head);
  const stack = stackBackward(lm_head.dx, trace.stack, weights.stack, config);
  const wte = { gradient: tableGradient(stack.dx, trace.idx, weights.wte) };
  if (weights.wte.weight === weights.lm_head.weight) {
    const [table, head] = [wte.gradient.weight, lm_head.gradient.weight];
    table.data.forEach((d, i) => (table.data[i] += head.data[i])); // both are the same matrix
    lm_head.gradient.weight = table;
  }
  return { loss, losses, gradient: gradientsOf({ wte, stack, lm_head }) };
}

/** The model after one step of gradient descent: each weight minus rate times its derivative. */
function descend(model, gradient, rate) {
  const moved = new Map(); // a tensor with two names stays one tensor
  function step(weights, slopes) {
    if (Array.isArray(weights)) return weights.map((value, i) => step(value, slopes[i]));
    if (!weights.shape) {
      return Object.fromEntries(Object.entries(weights).map(([name, value]) => [name, step(value, slopes[name])]));
    }
    if (!moved.has(weights)) {
      const data = weights.data.map((w, i) => w - rate * slopes.data[i]);
      moved.set(weights, { shape: weights.shape, data });
    }
    return moved.get(weights);
  }
  return { ...model, weights: step(model.weights, gradient) };
}

/** Names and tensors of weights, or of a gradient, in their order: [["wte.weight", {data, shape}], ...]. */
function namedTensors(tree, before = "") {
  if (tree.shape) return [[before, tree]];
  return Object.entries(tree).flatMap(([name, inner]) => namedTensors(inner, before ? `${before}.${name}` : name));
}

/** The root of the sum of squares of a list of tensors. */
function normOf(tensors) {
  return Math.sqrt(sumOf(tensors.map(({ data }) => dot(data, data))));
}

/** For each part of the model: its name, and the norms of its gradient and of its weights. */
function sizesByPart(model, gradient) {
  const slopes = new Map(namedTensors(gradient));
  const parts = new Map();
  for (const [name, weights] of namedTensors(model.weights)) {
    const part = partOf(name);
    if (!parts.has(part)) parts.set(part, []);
    parts.get(part).push([slopes.get(name), weights]);
  }
  return Array.from(parts, ([name, pairs]) => ({
    name,
    gradient: normOf(pairs.map(([slope]) => slope)),
    weights: normOf(pairs.map(([, weights]) => weights)),
  }));
}

function partOf(name) {
  const [, layer, branch] = name.match(/blocks\.(\d+)\.([a-z]+)/) ?? [];
  if (layer) return `layer ${+layer + 1} ${branch === "attn" ? "attention" : "MLP"}`;
  return { wte: "embedding", lm_head: "head" }[name.split(".")[0]] ?? (name.includes("wpe") ? "positions" : "norm");
}

if (typeof module !== "undefined") {
  Object.assign(globalThis, require("./model.js"));
  const parts = { ACTIVATIONS_BACKWARD, missingBackward, tokenLosses };
  module.exports = { ...parts, descend, lossAndGradient, namedTensors, sizesByPart };
}
