/* The trace of a text: everything that a model computes for it, token by token. The page shows and explains it.

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

const LOADED = new WeakMap(); // {model: the same, loaded}

/** The trace of a text, as described above.

model: {config, weights: {data, shape} by their names in the state dict, tokenizer_vocab_size}. idx: T token ids, at
most block_size. source: those of the text that a Transformer translates. before: the trace of an earlier text, which is
not changed; the first tokens that the two have in common are not computed again, and trace.first is their number.
lastOnly: logits and probs of the last token alone, null for the others, since a large vocabulary takes long.
dropout(x, name): what an embedding or a branch, a matrix, becomes, as by dropout in training; a trace that was made
with one is of no use as `before`. */
function forward(model, idx, { source = null, before = null, lastOnly = false, dropout = (x) => x } = {}) {
  if (!model.engine && !LOADED.has(model)) LOADED.set(model, load(model));
  const loaded = model.engine ? model : LOADED.get(model);
  if (before && !sameIds(source ?? [], before.source?.idx ?? [])) before = null;
  if (!isCausal(model.config)) before = null; // a new token changes all rows
  return loaded.engine.scope(() => {
    const {
      source: encoded = source && toRows(encode(loaded, source, dropout)),
      logits,
      probs,
      ...rest
    } = before ?? {};
    const first = before ? commonLength(idx, before.idx) : 0;
    let trace = first ? firstTokens(rest, first) : null;
    if (first < idx.length) {
      const read = MODELS[model.config.model];
      const options = { before: trace, dropout, source: encoded };
      trace = appendTokens(trace, toRows(read(loaded, idx.slice(first), options)));
    }
    if (encoded) trace.source = encoded;
    return { ...trace, ...predict(loaded, trace.output, { logits, probs, first, lastOnly }), first };
  });
}

/** logits and probs of the tokens from `first` on, or only of the last one. The rows before it stay as they were. */
function predict(model, output, { logits, probs, first, lastOnly }) {
  const kept = (rows) => output.map((_, t) => (t < first ? rows[t] : null));
  const y = { logits: kept(logits), probs: kept(probs) };
  const wanted = lastOnly ? [output.length - 1] : [...output.keys()];
  const missing = wanted.filter((t) => !y.logits[t]);
  if (!missing.length) return y;
  const rows = head(model, model.engine.stacked(missing.map((t) => output[t]))).toRows();
  missing.forEach((t, i) => {
    y.logits[t] = rows[i];
    y.probs[t] = probabilities(model, rows[i]);
  });
  return y;
}

/** The trace with lists of rows instead of matrices. A matrix with several names stays one list. */
function toRows(trace) {
  const copies = new Map();
  return mapTree(trace, isMatrix, (matrix) => {
    if (!copies.has(matrix)) copies.set(matrix, matrix.toRows());
    return copies.get(matrix);
  });
}

/** exp(x) / sum of exp(x) */
function softmax(x) {
  const { largest, sum } = sumOfExp(x);
  return Float32Array.from(x, (value) => Math.exp(value - largest) / sum);
}

/** The token where the sum of probabilities, in the order of ids, first exceeds the number from [0, 1). */
function drawFrom(probs, uniform) {
  let sum = 0;
  for (let id = 0; id < probs.length; id++) if ((sum += probs[id]) > uniform) return id;
  return probs.findLastIndex((p) => p > 0);
}

/** The probabilities of the tokenizer's tokens from one row of logits. */
function probabilities(model, logits) {
  return softmax(logits.subarray(0, model.tokenizer_vocab_size));
}

const meanOf = (numbers) => numbers.reduce((sum, x) => sum + x, 0) / numbers.length;

/** The loss of each next token: T - 1 of them. The rows of a padded vocabulary take part in softmax, as in training. */
function tokenLosses({ idx, logits }) {
  return idx.slice(1).map((id, t) => lossOf(logits[t], id));
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
