/* Matrices in the memory of a kernel, and the operations that models are made of.

Each operation computes a matrix. If the engine has a tape, it also pushes its own backward pass: a function that adds
to the gradients of what it has read, by the chain rule. When these functions are called, the last one first, x.grad
becomes the derivative of the loss by each number of x: see differentiate() in training.js.

kernel.js is needed. */

class Engine {
  constructor(kernel = KERNEL) {
    this.memory = kernel ? new WebAssembly.Memory({ initial: 1 }) : plainMemory();
    this.top = 0; // bytes that are in use
    this.tape = null;
    this.tiles = kernel && new WebAssembly.Instance(kernel, { engine: { memory: this.memory } }).exports;
  }

  /** A matrix whose numbers are whatever its memory held before. */
  matrix(rows, columns) {
    const from = this.top;
    this.top += 4 * rows * columns;
    const missing = this.top - this.memory.buffer.byteLength;
    if (missing > 0) this.memory.grow(Math.ceil(Math.max(missing, from / 2) / PAGE)); // by half: it rarely grows
    return new Matrix(this, from, rows, columns);
  }

  zeros(rows, columns) {
    const x = this.matrix(rows, columns);
    x.data.fill(0);
    return x;
  }

  /** The matrix of these rows. */
  stacked(rows) {
    const x = this.matrix(rows.length, rows[0].length);
    rows.forEach((row, i) => x.data.set(row, i * x.columns));
    return x;
  }

  /** Call f, and then free the memory of all matrices that it made. */
  scope(f) {
    const { top } = this;
    try {
      return f();
    } finally {
      this.top = top;
    }
  }
}

/** A matrix, or a part of one, which shares its numbers. Row i begins toRow numbers after row i - 1. If it has limits,
only the first limits[i] numbers of row i count: a causal query has no scores for later keys. */
class Matrix {
  constructor(engine, from, rows, columns, toRow = columns, toColumn = 1) {
    this.engine = engine;
    this.from = from; // address of the first number
    this.rows = rows;
    this.columns = columns;
    this.toRow = toRow;
    this.toColumn = toColumn;
    this.gradient = null;
  }

  /** The numbers from the first one on, row by row. Memory that grows moves, so ask again after making a matrix. */
  get data() {
    const length = (this.rows - 1) * this.toRow + (this.columns - 1) * this.toColumn + 1;
    return new Float32Array(this.engine.memory.buffer, this.from, Math.max(length, 0));
  }

  get grad() {
    return (this.gradient ??= this.engine.zeros(this.rows, this.columns));
  }

  part(row, rows, column = 0, columns = this.columns) {
    return new Matrix(this.engine, this.from + 4 * (row * this.toRow + column), rows, columns, this.toRow);
  }

  /** The transposed matrix of the same numbers. Only the first factor of a product may be one. */
  get flipped() {
    return new Matrix(this.engine, this.from, this.columns, this.rows, this.toColumn, this.toRow);
  }

  /** A copy of the transposed matrix. */
  transposed(y = this.engine.matrix(this.columns, this.rows)) {
    const [X, Y] = numbersOf(this, y);
    const { rows, columns, toRow } = this;
    const SIDE = 16; // squares of this side stay in the processor's cache
    for (let top = 0; top < rows; top += SIDE) {
      for (let left = 0; left < columns; left += SIDE) {
        const [bottom, right] = [Math.min(top + SIDE, rows), Math.min(left + SIDE, columns)];
        for (let i = top; i < bottom; i++) for (let j = left; j < right; j++) Y[j * rows + i] = X[i * toRow + j];
      }
    }
    return y;
  }

  /** A copy as a list of rows. */
  toRows() {
    const { rows, columns, limits } = this;
    const copy = this.data.slice();
    return Array.from({ length: rows }, (_, i) => copy.subarray(i * columns, i * columns + (limits?.[i] ?? columns)));
  }
}

const isMatrix = (value) => value instanceof Matrix;

const numbersOf = (...matrices) => matrices.map((matrix) => matrix.data);

const like = (x) => x.engine.matrix(x.rows, x.columns);

/** Add the backward pass of an operation to the tape, if there is one. */
function record(x, backward) {
  x.engine.tape?.push(backward);
}

// --------------------------------------------------------------------------------------
// Numbers

/** f of each number. slope(x, y): the derivative of f. */
function map(x, f, slope) {
  const y = like(x);
  const [X, Y] = numbersOf(x, y);
  for (let i = 0; i < X.length; i++) Y[i] = f(X[i]);
  record(x, () => {
    const [X, Y, dX, dY] = numbersOf(x, y, x.grad, y.grad);
    for (let i = 0; i < X.length; i++) dX[i] += dY[i] * slope(X[i], Y[i]);
  });
  return y;
}

/** scale x + z. z may have fewer rows, and then begins again after its last: a bias has one row for all. */
function add(x, z, scale = 1) {
  const y = like(x);
  const [X, Z, Y] = numbersOf(x, z, y);
  for (let at = 0; at < X.length; at += Z.length) {
    for (let i = 0; i < Z.length; i++) Y[at + i] = scale * X[at + i] + Z[i];
  }
  record(x, () => {
    const [dX, dZ, dY] = numbersOf(x.grad, z.grad, y.grad);
    for (let i = 0; i < dY.length; i++) dX[i] += scale * dY[i];
    for (let at = 0; at < dY.length; at += dZ.length) for (let i = 0; i < dZ.length; i++) dZ[i] += dY[at + i];
  });
  return y;
}

/** x z, number by number. z may have fewer rows, as in add(). */
function multiply(x, z) {
  const y = like(x);
  const [X, Z, Y] = numbersOf(x, z, y);
  for (let at = 0; at < X.length; at += Z.length) for (let i = 0; i < Z.length; i++) Y[at + i] = X[at + i] * Z[i];
  record(x, () => {
    const [X, Z, dX, dZ, dY] = numbersOf(x, z, x.grad, z.grad, y.grad);
    for (let at = 0; at < X.length; at += Z.length) {
      for (let i = 0; i < Z.length; i++) {
        dX[at + i] += dY[at + i] * Z[i];
        dZ[i] += dY[at + i] * X[at + i];
      }
    }
  });
  return y;
}

// --------------------------------------------------------------------------------------
// Rows

/** The rows of a table with these indices. */
function gather(table, indices) {
  const C = table.columns;
  const y = table.engine.matrix(indices.length, C);
  const [W, Y] = numbersOf(table, y);
  indices.forEach((index, r) => Y.set(W.subarray(index * C, (index + 1) * C), r * C));
  record(y, () => {
    const [dW, dY] = numbersOf(table.grad, y.grad);
    indices.forEach((index, r) => {
      for (let i = 0; i < C; i++) dW[index * C + i] += dY[r * C + i];
    });
  });
  return y;
}

/** The rows before x and those of x. before: a list of rows, or undefined. */
function joined(before, x) {
  if (!before) return x;
  const y = x.engine.matrix(before.length + x.rows, x.columns);
  before.forEach((row, t) => y.data.set(row, t * x.columns));
  y.data.set(x.data, before.length * x.columns);
  return y;
}

/** x W^T + b. x: (T, inputs); weight: (outputs, inputs), and turned: the same transposed. Returns (T, outputs). */
function linear(x, { weight, bias }) {
  const y = x.engine.matrix(x.rows, weight.rows);
  product(y, x, weight.turned);
  record(x, () => {
    product(x.grad, y.grad, weight, true);
    product(weight.grad, y.grad.flipped, x, true);
  });
  return bias ? add(y, bias) : y;
}

/** x_t + gain (w_1 x_(t-1) + w_2 x_(t-2) + ...). weight: (n, C). before: the rows before x. */
function causalConv(x, weight, gain, before) {
  const C = x.columns;
  const y = like(x);
  const text = joined(before, x);
  const first = text.rows - x.rows; // of the rows of x
  const [X, W, Y] = numbersOf(text, weight, y);
  Y.set(X.subarray(first * C));
  /** Call f with the places where a row of y, a row of the text that it reads, and a row of weight begin. */
  const eachTerm = (f) => {
    for (let r = 0; r < y.rows; r++) {
      const rows = Math.min(weight.rows, r + first);
      for (let back = 1; back <= rows; back++) f(r * C, (r + first - back) * C, (back - 1) * C);
    }
  };
  eachTerm((to, from, w) => {
    for (let i = 0; i < C; i++) Y[to + i] += gain * W[w + i] * X[from + i];
  });
  record(x, () => {
    const [X, W, dX, dW, dY] = numbersOf(x, weight, x.grad, weight.grad, y.grad);
    for (let i = 0; i < dY.length; i++) dX[i] += dY[i];
    eachTerm((to, from, w) => {
      for (let i = 0; i < C; i++) {
        dX[from + i] += gain * W[w + i] * dY[to + i];
        dW[w + i] += gain * X[from + i] * dY[to + i];
      }
    });
  });
  return y;
}

/** The last n rows of each row of x, side by side, the oldest first; zeros before the first. before: rows before x. */
function windows(x, n, before) {
  const { engine, rows, columns } = x;
  const text = joined(before, x);
  const y = engine.zeros(rows, n * columns);
  for (let r = 0; r < rows; r++) {
    const end = text.rows - rows + r + 1;
    const seen = text.part(Math.max(end - n, 0), Math.min(end, n)).data;
    y.data.set(seen, (r + 1) * y.columns - seen.length);
  }
  return y;
}

// --------------------------------------------------------------------------------------
// Norms

/** Divide each part of D neighbouring numbers of x by its root mean square, less their mean if `centred`.

Returns the output, and of each part mean and scale: (T, C / D). eps: keeps the scale from being 0. */
function standardize(x, D, eps, centred = false) {
  const y = like(x);
  const [mean, scale] = [0, 0].map(() => x.engine.zeros(x.rows, x.columns / D));
  const [X, Y, M, S] = numbersOf(x, y, mean, scale);
  for (let part = 0, at = 0; part < M.length; part++, at += D) {
    let [sum, squares] = [0, 0];
    if (centred) for (let i = at; i < at + D; i++) sum += X[i];
    const m = sum / D;
    for (let i = at; i < at + D; i++) squares += (X[i] - m) * (X[i] - m);
    const s = Math.sqrt(squares / D + eps);
    for (let i = at; i < at + D; i++) Y[i] = (X[i] - m) / s;
    [M[part], S[part]] = [m, s];
  }
  // each number of x also changes mean and scale, and through them all of its part
  record(x, () => {
    const [Y, S, dX, dY] = numbersOf(y, scale, x.grad, y.grad);
    for (let part = 0, at = 0; part < S.length; part++, at += D) {
      let [sum, products] = [0, 0];
      for (let i = at; i < at + D; i++) {
        sum += dY[i];
        products += dY[i] * Y[i];
      }
      const [byMean, byScale, rate] = [centred ? sum / D : 0, products / D, 1 / S[part]];
      for (let i = at; i < at + D; i++) dX[i] += rate * (dY[i] - byMean - Y[i] * byScale);
    }
  });
  return { output: y, mean, scale };
}

// --------------------------------------------------------------------------------------
// Attention

/** (a, b) -> (a cos - b sin, b cos + a sin) for all pairs (i, i + D/2) of each head. x: (T, n D); cos, sin: (T, D), of
which sin has a minus sign in its first half. */
function rotate(x, { cos, sin }) {
  const y = like(x);
  const D = cos.columns;
  /** Add to `to` what `from` becomes, turned by its positions' angles, or back by them. */
  const turn = (to, from, back) => {
    const [Y, X, COS, SIN] = numbersOf(to, from, cos, sin);
    for (let head = 0; head < X.length; head += D) {
      const angles = Math.floor(head / x.columns) * D;
      for (let i = head, j = head + D / 2, angle = angles; i < head + D / 2; i++, j++, angle++) {
        const sin = back ? SIN[angle] : -SIN[angle];
        Y[i] += X[i] * COS[angle] - X[j] * sin;
        Y[j] += X[j] * COS[angle] + X[i] * sin;
      }
    }
  };
  y.data.fill(0);
  turn(y, x, false);
  record(x, () => turn(x.grad, y.grad, true));
  return y;
}

const BLOCK = 32; // queries that are computed at once: where attention is causal, only with the keys up to the last one

/** softmax(q k^T / sqrt(D) + mask) v of each head. q: (T, H D); k, v: the same for S tokens, or narrower if groups of
neighbouring heads share one. masks: (T, S), one for each head or one for all; undefined: none.

causal: the queries are those of the last T keys, and each sees the keys up to its own.
Returns heads, (T, H D), side by side, and of each head scores, before the mask, and weights: (T, S). */
function attend(q, k, v, n_head, { masks, causal = false } = {}) {
  const D = q.columns / n_head;
  const group = q.columns / k.columns; // heads that share one head of keys and values
  const first = causal ? k.rows - q.rows : Infinity; // the keys before the first query
  const y = { heads: like(q), scores: [], weights: [] };
  masks ??= [q.engine.zeros(q.rows, k.rows)];
  for (let h = 0; h < n_head; h++) {
    const ofQuery = (x) => x.part(0, x.rows, h * D, D);
    const ofKey = (x) => x.part(0, x.rows, Math.floor(h / group) * D, D);
    const head = { q: ofQuery(q), k: ofKey(k), v: ofKey(v), y: ofQuery(y.heads), first };
    const [scores, weights] = attendHead(head, masks[h % masks.length]);
    y.scores.push(scores);
    y.weights.push(weights);
    record(q, () => {
      const [dq, dk, dv, dy] = [ofQuery(q.grad), ofKey(k.grad), ofKey(v.grad), ofQuery(y.heads.grad)];
      q.engine.scope(() => attendHeadBackward(head, weights, { dq, dk, dv, dy }));
    });
  }
  return y;
}

/** The number of keys that query t sees. */
function keysSeen(S, first, t) {
  return Math.min(first + t + 1, S);
}

/** Call f(first query, number of queries, number of keys that they see) for each block of queries. */
function eachBlock(T, S, first, f) {
  for (let t = 0, n; t < T; t += n) {
    n = Math.min(BLOCK, T - t);
    f(t, n, keysSeen(S, first, t + n - 1));
  }
}

/** Divide the scores A of one query by root, and make W the softmax of scores and mask. The largest is subtracted first,
which only prevents overflow. */
function weigh(A, W, mask, from, end, root) {
  let [largest, sum] = [-Infinity, 0];
  for (let s = from; s < end; s++) {
    A[s] /= root;
    W[s] = A[s] + mask[s];
    if (W[s] > largest) largest = W[s];
  }
  for (let s = from; s < end; s++) sum += W[s] = Math.exp(W[s] - largest);
  const rate = 1 / sum;
  for (let s = from; s < end; s++) W[s] *= rate;
}

function attendHead({ q, k, v, y, first }, mask) {
  const [T, S] = [q.rows, k.rows];
  const root = Math.sqrt(q.columns);
  const limits = Array.from({ length: T }, (_, t) => keysSeen(S, first, t));
  const turned = k.transposed();
  const [scores, weights] = [0, 0].map(() => Object.assign(q.engine.matrix(T, S), { limits }));
  eachBlock(T, S, first, (t, queries, keys) => {
    product(scores.part(t, queries, 0, keys), q.part(t, queries), turned.part(0, turned.rows, 0, keys));
    const [A, W] = numbersOf(scores.part(t, queries), weights.part(t, queries));
    const bias = mask.part(t, queries).data;
    for (let row = 0; row < queries; row++) {
      const end = row * S + limits[t + row];
      weigh(A, W, bias, row * S, end, root);
      for (let s = end; s < row * S + keys; s++) W[s] = 0;
    }
    product(y.part(t, queries), weights.part(t, queries, 0, keys), v.part(0, keys));
  });
  return [scores, weights];
}

/** The weights of a query are 1 together, so a score changes the output only as far as its value differs from the mean:
the derivative by it is weight (dweight - mean of dweight). */
function attendHeadBackward({ q, k, v, first }, weights, { dq, dk, dv, dy }) {
  const [T, S] = [q.rows, k.rows];
  const rate = 1 / Math.sqrt(q.columns);
  const turned = v.transposed();
  const scratch = q.engine.matrix(BLOCK, S);
  eachBlock(T, S, first, (t, queries, keys) => {
    const own = weights.part(t, queries, 0, keys);
    const dscores = scratch.part(0, queries, 0, keys);
    product(dscores, dy.part(t, queries), turned.part(0, turned.rows, 0, keys));
    product(dv.part(0, keys), own.flipped, dy.part(t, queries), true);
    const [W, dA] = numbersOf(own, dscores);
    for (let from = 0; from < queries * S; from += S) {
      let mean = 0;
      for (let s = from; s < from + keys; s++) mean += W[s] * dA[s];
      for (let s = from; s < from + keys; s++) dA[s] = rate * W[s] * (dA[s] - mean);
    }
    product(dq.part(t, queries), dscores, k.part(0, keys), true);
    product(dk.part(0, keys), dscores.flipped, q.part(t, queries), true);
  });
}

// --------------------------------------------------------------------------------------
// Loss

/** The largest of some numbers, and the sum of exp(x - largest): subtracting it only prevents overflow. */
function sumOfExp(numbers) {
  const largest = numbers.reduce((a, b) => Math.max(a, b), -Infinity);
  return { largest, sum: numbers.reduce((sum, x) => sum + Math.exp(x - largest), 0) };
}

/** -ln of the probability that softmax gives to number `id` of some logits, in nats. */
function lossOf(logits, id) {
  const { largest, sum } = sumOfExp(logits);
  return largest + Math.log(sum) - logits[id];
}

/** The losses of the targets: an id for each row of logits, or -1 for a row that predicts nothing. The tape computes the
gradients of their sum divided by `count`. */
function crossEntropy(logits, targets, count) {
  const V = logits.columns;
  const rowOf = (numbers, r) => numbers.subarray(r * V, (r + 1) * V);
  const losses = targets.flatMap((id, r) => (id < 0 ? [] : [lossOf(rowOf(logits.data, r), id)]));
  record(logits, () => {
    const [X, dX] = numbersOf(logits, logits.grad);
    targets.forEach((id, r) => {
      if (id < 0) return;
      const [row, gradient] = [rowOf(X, r), rowOf(dX, r)];
      const { largest, sum } = sumOfExp(row);
      for (let i = 0; i < V; i++) gradient[i] += Math.exp(row[i] - largest) / sum / count;
      gradient[id] -= 1 / count;
    });
  });
  return losses;
}
