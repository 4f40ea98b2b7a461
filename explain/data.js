/* From the data that humptygpt/page/page_data.py wrote into the page to the model and the tokenizer. */

/** CRC-32 of bytes, as in zlib. */
function crc32(bytes) {
  const table = Uint32Array.from({ length: 256 }, (_, n) => {
    for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
    return n;
  });
  let crc = 0xffffffff;
  for (const byte of bytes) crc = table[(crc ^ byte) & 255] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

const DAMAGED = "This page is damaged: its checksum is not that of its data. Make it again with explain.py.";

/** Parse the data of a page. Throws an Error if it was damaged. checksum: CRC-32 of the text, 8 hexadecimal digits. */
function readData(text, checksum) {
  const bytes = new TextEncoder().encode(text);
  if (crc32(bytes) !== parseInt(checksum, 16)) throw new Error(DAMAGED);
  return JSON.parse(text);
}

/** Make the model for forward(). data: as from readData(). */
function makeModel(data) {
  const { buffer } = toBytes(atob(data.weights.bytes));
  return withWeights(data, (shape, offset) => readTensor(buffer, shape, offset));
}

/** The model as it was at one of data.snapshots: {iter, rows}. Its weights are rounded to 8 bits.

Each row of a matrix, and each vector, is a float32 scale and its weights as multiples of that scale, -127 to 127. */
function makeSnapshot(data, { rows }) {
  const view = new DataView(toBytes(atob(rows)).buffer);
  let at = 0;
  return withWeights(data, (shape) => {
    const tensor = new Float32Array(sizeOf(shape));
    const columns = shape.at(-1);
    for (let i = 0, scale; i < tensor.length; i++) {
      if (i % columns === 0) {
        scale = view.getFloat32(at, true);
        at += 4;
      }
      tensor[i] = scale * view.getInt8(at++);
    }
    return tensor;
  });
}

/** Make the tree of weights. read(shape, offset) returns the numbers of a tensor; it is called in their order. */
function withWeights({ model, weights, tokenizer }, read) {
  const tensors = new Map(); // a tensor with two names is read once
  const tree = {};
  for (const { name, shape, offset } of weights.tensors) {
    if (!tensors.has(offset)) tensors.set(offset, { data: read(shape, offset), shape });
    plant(tree, name.split("."), tensors.get(offset));
  }
  return { config: model, weights: tree, tokenizer_vocab_size: tokenizer.pieces.lengths.length };
}

/** The bytes that a string of characters up to U+00FF stands for. */
function toBytes(text) {
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

function sizeOf(shape) {
  return shape.reduce((product, size) => product * size, 1);
}

function readTensor(buffer, shape, offset) {
  const half = new Uint16Array(buffer, offset, sizeOf(shape));
  const data = new Float32Array(half.length);
  for (let i = 0; i < half.length; i++) data[i] = FLOAT16[half[i]];
  return data;
}

/** The value of each pattern of 16 bits: 1 of the sign, 5 of the exponent, 10 of the fraction. */
const FLOAT16 = Float32Array.from({ length: 65536 }, (_, bits) => {
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -14 * (fraction / 1024);
});

/** "blocks.0.attn.q_proj.weight" -> tree.blocks[0].attn.q_proj.weight */
function plant(tree, [name, ...rest], tensor) {
  if (!rest.length) tree[name] = tensor;
  else plant((tree[name] ??= /^\d+$/.test(rest[0]) ? [] : {}), rest, tensor);
}

// --------------------------------------------------------------------------------------
// Weights in the memory of an engine

/** A model in the memory of an engine: the same with matrices as weights, and engine. It may be trained. */
function load(model, engine = new Engine()) {
  const loaded = new Map(); // a tensor with two names stays one
  const place = (tensor) => {
    const { data, shape } = tensor;
    const matrix = engine.matrix(shape.length > 1 ? shape[0] : 1, shape.at(-1));
    matrix.data.set(data);
    if (shape.length > 1) matrix.turned = matrix.transposed();
    return matrix;
  };
  const weights = mapTree(model.weights, isTensor, (tensor) => {
    if (!loaded.has(tensor)) loaded.set(tensor, place(tensor));
    return loaded.get(tensor);
  });
  return { ...model, weights, engine };
}

const isTensor = (value) => value?.shape !== undefined;

/** A tree with f(part) instead of each part that is wanted. */
function mapTree(tree, wanted, f) {
  if (wanted(tree)) return f(tree);
  if (Array.isArray(tree)) return typeof tree[0] === "object" ? tree.map((item) => mapTree(item, wanted, f)) : tree;
  if (tree === null || typeof tree !== "object" || ArrayBuffer.isView(tree)) return tree;
  return Object.fromEntries(Object.entries(tree).map(([key, item]) => [key, mapTree(item, wanted, f)]));
}

/** The weights of a model: [["wte.weight", matrix or tensor], ...]. One with two names is there once. */
function namedWeights(model) {
  const found = new Map();
  const walk = (tree, names) => {
    if (!tree.data) for (const [name, part] of Object.entries(tree)) walk(part, [...names, name]);
    else if (!found.has(tree)) found.set(tree, names.join("."));
  };
  walk(model.weights, []);
  return Array.from(found, ([weight, name]) => [name, weight]);
}

/** Give a model other numbers: a list for each of its weights. */
function setWeights(model, numbers) {
  namedWeights(model).forEach(([, weight], i) => {
    weight.data.set(numbers[i]);
    if (weight.turned) weight.transposed(weight.turned);
  });
}

// --------------------------------------------------------------------------------------
// From typed text to token ids

/** The token ids of a text, as sample.py reads a prompt. */
function idsOf(tokenizer, text) {
  let ids = [];
  if (tokenizer.eot !== null && text.startsWith("<|endoftext|>")) {
    ids = tokenizer.start;
    text = text.slice("<|endoftext|>".length);
  }
  ids = ids.concat(tokenizer.encode(text));
  return ids.length ? ids : tokenizer.start;
}

/** The index of the first of n tokens that is in the context. As in sample.py, the newest half of a full context is
kept when it is full. A network without attention reads the newest block_size tokens for each prediction. */
function contextStart({ model, block_size }, n) {
  if (n <= block_size) return 0;
  if (model === "window_mlp") return n - block_size;
  const dropped = block_size + 1 - Math.max(block_size >> 1, 1); // each time it is full
  return Math.ceil((n - block_size) / dropped) * dropped;
}

/** Read a text for a GPT: all of its token ids, and idx, those in the context. ids: given if the model wrote it. */
function readText({ model, tokenizer }, text, ids = idsOf(tokenizer, text)) {
  return { ids, idx: ids.slice(contextStart(model.config, ids.length)) };
}

/** Read source and target. A GPT reads one after the other. A target starts with end-of-text, which ends a source.

lost: the numbers of tokens of the source and of the target for which there is no room. */
function readPair({ model, tokenizer }, sourceText, targetText, ids = tokenizer.encode(targetText)) {
  const { config } = model;
  const encoder = config.model === "transformer";
  const room = (encoder ? config.block_size : config.block_size >> 1) - 1;
  const words = sourceText.split(/\s+/).filter((word) => word);
  const whole = tokenizer.encode(words.join(" "));
  const source = whole.slice(0, room).concat(tokenizer.eot);
  const target = (encoder ? [tokenizer.eot] : source).concat(ids);
  const idx = target.slice(0, config.block_size);
  const lost = { source: Math.max(whole.length - room, 0), target: target.length - idx.length };
  return { ids, idx, lost, ...(encoder ? { source } : {}) };
}
