"use strict";

/* The memory of a model, and products of matrices in it: a WebAssembly kernel that is assembled here, and the same sums
in plain JavaScript, for a browser that forbids WebAssembly.

Both compute in float32, and add up the terms of each number in their order, from the first to the last. So both give
the same bits, and a row has the same bits whether it is computed by itself or with others. */

/** Bytes of a module with a function for each tile of C, rows x 4 vectors numbers, which adds a product of A and B to it.

Its parameters: the address of the tile in C, and the bytes from one row of C to the next; the address of its rows in A,
and the bytes to the next row and to the next column; the address of its columns in B, and the bytes to the next row;
the number of terms of each sum. */
function assembleKernel() {
  const [C, C_ROW, A, A_ROW, A_COLUMN, B, B_ROW, TERMS, NEXT_A, NEXT_C, FIRST] = Array(11).keys();
  const [I32, V128] = [0x7f, 0x7b];

  const number = (n) => (n < 128 ? [n] : [(n & 127) | 128, ...number(n >> 7)]); // LEB128
  const list = (items) => [...number(items.length), ...items.flat()];
  const section = (id, items) => [id, ...number(list(items).length), ...list(items)];
  const text = (name) => list(Array.from(name, (letter) => letter.charCodeAt(0)));

  const get = (local) => [0x20, local];
  const set = (local) => [0x21, local];
  const moved = (address, bytes) => [...get(address), ...get(bytes), 0x6a]; // their sum
  const load = (address, offset) => [...get(address), 0xfd, 0x00, 2, offset]; // four numbers
  const spread = (address) => [...get(address), 0xfd, 0x09, 2, 0]; // one number to all four of a vector
  const store = (address, offset, vector) => [...get(address), ...get(vector), 0xfd, 0x0b, 2, offset];
  const product = (x, y) => [...get(x), ...get(y), 0xfd, 0xe6, 1];
  const sum = (x, y) => [...x, ...y, 0xfd, 0xe4, 1];

  function tile(name) {
    const [rows, width] = name.split("x").map(Number);
    const vectors = [...Array(width).keys()];
    // the locals with vectors: the sums of each row, columns of B, and a number of A
    const own = (row, v) => FIRST + row * width + v;
    const value = FIRST + (rows + 1) * width;
    const addresses = { a: [A, NEXT_A].slice(0, rows), c: [C, NEXT_C].slice(0, rows) };
    const eachSum = (f) => addresses.c.flatMap((c, row) => vectors.flatMap((v) => f(c, 16 * v, own(row, v))));
    const code = [
      ...[...moved(A, A_ROW), ...set(NEXT_A), ...moved(C, C_ROW), ...set(NEXT_C)],
      ...eachSum((c, offset, own) => [...load(c, offset), ...set(own)]),
      ...[0x03, 0x40], // loop, once for each term
      ...vectors.flatMap((v) => [...load(B, 16 * v), ...set(own(rows, v))]),
      ...addresses.a.flatMap((a, row) => [
        ...[...spread(a), ...set(value)],
        ...vectors.flatMap((v) => [...sum(get(own(row, v)), product(value, own(rows, v))), ...set(own(row, v))]),
        ...[...moved(a, A_COLUMN), ...set(a)],
      ]),
      ...[...moved(B, B_ROW), ...set(B)],
      ...[...get(TERMS), 0x41, 1, 0x6b, 0x22, TERMS], // one term less
      ...[0x0d, 0, 0x0b], // once more if there are some left
      ...eachSum(store),
      0x0b,
    ];
    const locals = list([[FIRST - NEXT_A, I32], [(rows + 1) * width + 1, V128]]);
    return [...number(locals.length + code.length), ...locals, ...code];
  }

  const type = [0x60, ...list(Array(NEXT_A).fill(I32)), 0]; // of all functions
  return Uint8Array.from([
    ...[0, 0x61, 0x73, 0x6d, 1, 0, 0, 0], // WebAssembly, version 1
    ...section(1, [type]),
    ...section(2, [[...text("engine"), ...text("memory"), 2, 0, 1]]),
    ...section(3, TILES.map(() => 0)),
    ...section(7, TILES.map((name, i) => [...text(name), 0, i])),
    ...section(10, TILES.map(tile)),
  ]);
}

/** Rows and vectors of four columns. */
const TILES = ["1x1", "2x1", "1x4", "2x4"];

/** The kernel, or null where a Content-Security-Policy forbids it or a browser does not know it. */
const KERNEL = (() => {
  try {
    return new WebAssembly.Module(assembleKernel());
  } catch {
    return null;
  }
})();

const PAGE = 65536; // bytes by which memory grows

/** Memory without WebAssembly. */
function plainMemory() {
  const buffer = new ArrayBuffer(PAGE, { maxByteLength: 2 ** 31 });
  return { buffer, grow: (pages) => buffer.resize(buffer.byteLength + pages * PAGE) };
}

/** c = a b, or c += a b. All are matrices of engine.js. */
function product(c, a, b, adds = false) {
  const { tiles } = c.engine;
  const { data } = c;
  if (!adds) for (let m = 0; m < c.rows; m++) data.fill(0, m * c.toRow, m * c.toRow + c.columns);
  const done = tiles ? c.columns - (c.columns % 4) : 0;
  for (let n = 0, width; n < done; n += 4 * width) {
    width = done - n < 16 ? 1 : 4;
    const [one, two] = [tiles[`1x${width}`], tiles[`2x${width}`]];
    for (let m = 0; m < c.rows; m += 2) {
      const tile = m + 1 < c.rows ? two : one;
      const [cAt, aAt, bAt] = [c.from + 4 * (m * c.toRow + n), a.from + 4 * m * a.toRow, b.from + 4 * n];
      tile(cAt, 4 * c.toRow, aAt, 4 * a.toRow, 4 * a.toColumn, bAt, 4 * b.toRow, a.columns);
    }
  }
  if (done < c.columns) addPlainProduct(c, a, b, done);
}

/** c += a b from column `first` on. Math.fround rounds to float32. */
function addPlainProduct(c, a, b, first = 0) {
  const [C, A, B] = [c, a, b].map(({ data }) => data);
  for (let m = 0; m < c.rows; m++) {
    const row = C.subarray(m * c.toRow + first, m * c.toRow + c.columns);
    for (let k = 0; k < a.columns; k++) {
      const x = A[m * a.toRow + k * a.toColumn];
      for (let i = 0, at = k * b.toRow + first; i < row.length; i++) row[i] += Math.fround(x * B[at + i]);
    }
  }
}

if (typeof module !== "undefined") module.exports = { KERNEL, PAGE, TILES, plainMemory, addPlainProduct, product };
