"use strict";

/* The memory of a model, and products of matrices in it: a WebAssembly kernel that is assembled here, and the same sums
in plain JavaScript, for a browser that forbids WebAssembly.

Both compute in float32, and add up the terms of each number in their order, from the first to the last. So both give
the same bits, and a row has the same bits whether it is computed by itself or with others. */

/** Bytes of a module with a function for each tile of C, ROWS x 4 VECTORS numbers, that adds up a product of A and B.

Its parameters: the address of the tile in C and the bytes from one row of C to the next; the address of the rows of A,
and the bytes to the next row and to the next column; the address of the columns of B, and the bytes to the next row;
the number of terms; whether they are added to what C holds. */
function assembleKernel() {
  const [C, C_ROW, A, A_ROW, A_COLUMN, B, B_ROW, TERMS, ADDS, SECOND_A, SECOND_C] = [...Array(11).keys()];
  const PARAMETERS = 9;
  const [I32, V128] = [0x7f, 0x7b];

  const number = (n) => (n < 128 ? [n] : [(n & 127) | 128, ...number(n >> 7)]); // LEB128
  const list = (items) => [...number(items.length), ...items.flat()];
  const section = (id, items) => [id, ...number(list(items).length), ...list(items)];
  const text = (name) => list([...name].map((letter) => letter.charCodeAt(0)));

  const get = (local) => [0x20, ...number(local)];
  const set = (local) => [0x21, ...number(local)];
  const simd = (...code) => [0xfd, ...code];
  const load = (address, offset) => [...get(address), ...simd(0x00, 2, ...number(offset))];
  const loadToAll = (address) => [...get(address), ...simd(0x09, 2, 0)]; // one number to the four of a vector
  const store = (address, offset, vector) => [...get(address), ...get(vector), ...simd(0x0b, 2, ...number(offset))];
  const zero = simd(0x0c, ...Array(16).fill(0));
  const sum = (x, y) => [...x, ...y, ...simd(0xe4, 1)];
  const times = (x, y) => [...x, ...y, ...simd(0xe6, 1)];
  const move = (address, bytes) => [...get(address), ...get(bytes), 0x6a, ...set(address)];

  function tile(name) {
    const [rows, vectors] = name.split("x").map(Number);
    const firstVector = SECOND_C + 1;
    const sums = Array.from({ length: rows * vectors }, (_, i) => ({ row: i % rows, v: Math.floor(i / rows) }));
    const own = ({ row, v }) => firstVector + row * vectors + v; // the local that holds a sum
    const column = (v) => firstVector + rows * vectors + v;
    const value = firstVector + (rows + 1) * vectors;
    const rowsOfA = [A, SECOND_A].slice(0, rows);
    const at = ({ row, v }) => [[C, SECOND_C][row], 16 * v];
    const columns = Array.from({ length: vectors }, (_, v) => v);
    const term = (row, v) => sum(get(own({ row, v })), times(get(value), get(column(v))));
    const code = [
      ...[...get(A), ...set(SECOND_A), ...move(SECOND_A, A_ROW)],
      ...[...get(C), ...set(SECOND_C), ...move(SECOND_C, C_ROW)],
      ...[...get(ADDS), 0x04, 0x40], // if
      ...sums.flatMap((each) => [...load(...at(each)), ...set(own(each))]),
      0x05, // else
      ...sums.flatMap((each) => [...zero, ...set(own(each))]),
      0x0b, // end
      ...[0x03, 0x40], // loop, once for each term
      ...columns.flatMap((v) => [...load(B, 16 * v), ...set(column(v))]),
      ...rowsOfA.flatMap((address, row) => [
        ...[...loadToAll(address), ...set(value)],
        ...columns.flatMap((v) => [...term(row, v), ...set(own({ row, v }))]),
      ]),
      ...[...rowsOfA.flatMap((address) => move(address, A_COLUMN)), ...move(B, B_ROW)],
      ...[...get(TERMS), 0x41, 1, 0x6b, 0x22, TERMS], // one term less
      ...[0x0d, 0, 0x0b], // again while there are some; end
      ...sums.flatMap((each) => store(...at(each), own(each))),
      0x0b, // end of the function
    ];
    const locals = [
      [2, I32],
      [(rows + 1) * vectors + 1, V128],
    ];
    const body = [...list(locals), ...code];
    return [...number(body.length), ...body];
  }

  return Uint8Array.from([
    ...[0, ...text("asm").slice(1), 1, 0, 0, 0],
    ...section(1, [[0x60, ...list(Array(PARAMETERS).fill(I32)), 0]]), // a type of functions
    ...section(2, [[...text("engine"), ...text("memory"), 2, 0, 1]]),
    ...section(3, Array(TILES.length).fill(0)), // all functions are of this type
    ...section(
      7,
      TILES.map((name, i) => [...text(name), 0, i]),
    ),
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
  const done = tiles ? c.columns - (c.columns % 4) : 0;
  for (let n = 0, vectors; n < done; n += 4 * vectors) {
    vectors = done - n < 16 ? 1 : 4;
    const [one, two] = [tiles[`1x${vectors}`], tiles[`2x${vectors}`]];
    for (let m = 0, rows; m < c.rows; m += rows) {
      rows = c.rows - m < 2 ? 1 : 2;
      const tile = rows < 2 ? one : two;
      const [cAt, aAt, bAt] = [c.from + 4 * (m * c.toRow + n), a.from + 4 * m * a.toRow, b.from + 4 * n];
      tile(cAt, 4 * c.toRow, aAt, 4 * a.toRow, 4 * a.toColumn, bAt, 4 * b.toRow, a.columns, adds);
    }
  }
  if (done < c.columns) plainProduct(c, a, b, adds, done);
}

/** The same from column `first` on. Math.fround rounds to float32. */
function plainProduct(c, a, b, adds, first = 0) {
  const [C, A, B] = [c, a, b].map(({ data }) => data);
  for (let m = 0; m < c.rows; m++) {
    const row = C.subarray(m * c.toRow + first, m * c.toRow + c.columns);
    if (!adds) row.fill(0);
    for (let k = 0; k < a.columns; k++) {
      const x = A[m * a.toRow + k * a.toColumn];
      for (let i = 0, at = k * b.toRow + first; i < row.length; i++) row[i] += Math.fround(x * B[at + i]);
    }
  }
}

if (typeof module !== "undefined") module.exports = { KERNEL, PAGE, TILES, plainMemory, plainProduct, product };
