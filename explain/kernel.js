/* The memory of a model, and products of matrices in it: a WebAssembly kernel that is assembled here, and the same sums
in plain JavaScript, for a browser that forbids WebAssembly.

Both compute in float32, and add up the terms of each number in their order, from the first to the last. So both give
the same bits, and a row has the same bits whether it is computed by itself or with others. */

/** Bytes of a module with a function for each kind of tile, rows x 4 width numbers, which computes a column of tiles.

Its parameters: the address of the first tile in C, and the bytes from one row of C to the next; the address of its rows
in A, and the bytes to the next row and to the next column; the address of its columns in B, and the bytes to the next
row; the number of terms of each sum; whether they are added to what C holds; the number of tiles. */
function assembleKernel() {
  const [C, C_ROW, A, A_ROW, A_COLUMN, B, B_ROW, TERMS, ADDS, TILE, ...locals] = Array(16).keys();
  const [a0, a1, c1, b, term, FIRST] = locals;
  const [I32, V128] = [0x7f, 0x7b];

  const number = (n) => (n < 128 ? [n] : [(n & 127) | 128, ...number(n >> 7)]); // LEB128
  const list = (items) => [...number(items.length), ...items.flat()];
  const section = (id, items) => [id, ...number(list(items).length), ...list(items)];
  const text = (name) => list(Array.from(name, (letter) => letter.charCodeAt(0)));

  const get = (local) => [0x20, local];
  const set = (local) => [0x21, local];
  const copy = (local, from) => [...get(from), ...set(local)];
  const move = (local, from, bytes) => [...get(from), ...get(bytes), 0x6a, ...set(local)]; // local = from + bytes
  const again = (count) => [...get(count), 0x41, 1, 0x6b, 0x22, count, 0x0d, 0, 0x0b]; // if one less is not 0
  const load = (address, offset) => [...get(address), 0xfd, 0x00, 2, offset]; // four numbers
  const spread = (address) => [...get(address), 0xfd, 0x09, 2, 0]; // one number to all four of a vector
  const store = (address, offset, vector) => [...get(address), ...get(vector), 0xfd, 0x0b, 2, offset];
  const zero = [0xfd, 0x0c, ...Array(16).fill(0)];
  const product = (x, y) => [...get(x), ...get(y), 0xfd, 0xe6, 1];
  const sum = (x, y) => [...x, ...y, 0xfd, 0xe4, 1];
  const LOOP = [0x03, 0x40];

  function column(name) {
    const [rows, width] = name.split("x").map(Number);
    const vectors = [...Array(width).keys()];
    // the locals with vectors: the sums of each row, columns of B, and a number of A
    const own = (row, v) => FIRST + row * width + v;
    const value = FIRST + (rows + 1) * width;
    const [rowsOfA, rowsOfC] = [[a0, a1].slice(0, rows), [C, c1].slice(0, rows)];
    const eachSum = (f) => rowsOfC.flatMap((c, row) => vectors.flatMap((v) => f(c, 16 * v, own(row, v))));
    const code = [
      ...LOOP, // once for each tile
      ...[...copy(a0, A), ...move(a1, A, A_ROW), ...move(c1, C, C_ROW), ...copy(b, B), ...copy(term, TERMS)],
      ...[...get(ADDS), 0x04, 0x40], // if
      ...eachSum((c, offset, own) => [...load(c, offset), ...set(own)]),
      0x05, // else
      ...eachSum((c, offset, own) => [...zero, ...set(own)]),
      0x0b, // end
      ...LOOP, // once for each term
      ...vectors.flatMap((v) => [...load(b, 16 * v), ...set(own(rows, v))]),
      ...rowsOfA.flatMap((a, row) => [
        ...[...spread(a), ...set(value)],
        ...vectors.flatMap((v) => [...sum(get(own(row, v)), product(value, own(rows, v))), ...set(own(row, v))]),
        ...move(a, a, A_COLUMN),
      ]),
      ...[...move(b, b, B_ROW), ...again(term)],
      ...eachSum(store),
      ...rowsOfA.flatMap(() => [...move(A, A, A_ROW), ...move(C, C, C_ROW)]),
      ...[...again(TILE), 0x0b],
    ];
    const declared = list([[FIRST - a0, I32], [(rows + 1) * width + 1, V128]]);
    return [...number(declared.length + code.length), ...declared, ...code];
  }

  const type = [0x60, ...list(Array(a0).fill(I32)), 0]; // of all functions
  return Uint8Array.from([
    ...[0, 0x61, 0x73, 0x6d, 1, 0, 0, 0], // WebAssembly, version 1
    ...section(1, [type]),
    ...section(2, [[...text("engine"), ...text("memory"), 2, 0, 1]]),
    ...section(3, TILES.map(() => 0)),
    ...section(7, TILES.map((name, i) => [...text(name), 0, i])),
    ...section(10, TILES.map(column)),
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
  for (let n = 0, width; n < done; n += 4 * width) {
    width = done - n < 16 ? 1 : 4;
    const ofA = [4 * a.toRow, 4 * a.toColumn];
    const ofB = [b.from + 4 * n, 4 * b.toRow];
    const compute = (rows, m, count) => {
      const [cAt, aAt] = [c.from + 4 * (m * c.toRow + n), a.from + 4 * m * a.toRow];
      tiles[`${rows}x${width}`](cAt, 4 * c.toRow, aAt, ...ofA, ...ofB, a.columns, adds, count);
    };
    if (c.rows > 1) compute(2, 0, c.rows >> 1);
    if (c.rows % 2) compute(1, c.rows - 1, 1);
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
