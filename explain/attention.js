/* Attention over the text: all heads to choose from, the selected token's arcs, and the weights themselves. */

const narrow = matchMedia("(max-width: 44rem)");
/** The largest number of tokens that a matrix shows in each direction, so that its cells can be read. */
const regionSize = () => (narrow.matches ? 15 : 48);
const THUMB = 48; // the largest size of a small picture, in pixels

const attentionOf = (app, branch) => lookUp(app.trace, blockPath(app, branch));

/** A small picture of each head of all layers, or of the selected one; one is selected. branch: attn or cross_attn. */
function headGrid(app, branch, { oneLayer = false } = {}) {
  const cell = (layer, head) => {
    const canvas = h("canvas", { "aria-hidden": "true" });
    const name = `layer ${layer + 1}, head ${head + 1}`;
    const press = () => app.select({ layer, head, number: null });
    const root = button([canvas], press, { class: "thumb", "aria-label": name, title: name });
    const update = () => {
      root.setAttribute("aria-pressed", layer === app.at.layer && head === app.at.head);
      paintMatrix(canvas, lookUp(app.trace, `${app.stack}.blocks.${layer}.${branch}`).weights[head]);
    };
    return { root, update };
  };
  const columns = Array.from({ length: app.config.n_layer }, (_, layer) => {
    const cells = Array.from({ length: app.config.n_head }, (_, head) => cell(layer, head));
    return group("head-column", h("span", { class: "note" }, `Layer ${layer + 1}`), cells);
  });
  const update = () =>
    columns.forEach((column, layer) => {
      column.root.hidden = oneLayer && layer !== app.at.layer;
      if (!column.root.hidden) column.update();
    });
  const attributes = { class: "head-grid", role: "group", "aria-label": "Layers and heads" };
  return { root: h("div", attributes, columns.map(({ root }) => root)), update };
}

/** Paint weights, each row scaled to its largest; if there are many, show the largest of neighbours. */
function paintMatrix(canvas, rows) {
  const S = rows.reduce((most, row) => Math.max(most, row.length), 1);
  const [height, width] = [Math.min(rows.length, THUMB), Math.min(S, THUMB)];
  const cells = new Float32Array(height * width);
  const column = Uint8Array.from({ length: S }, (_, s) => (s * width) / S);
  rows.forEach((row, t) => {
    const scale = 1 / largest(row);
    const from = Math.floor((t * height) / rows.length) * width;
    for (let s = 0; s < row.length; s++) {
      const at = from + column[s];
      if (row[s] * scale > cells[at]) cells[at] = row[s] * scale;
    }
  });
  paintCells(canvas, height, width, (row, column) => cells[row * width + column]);
}

/** The selected token's weights over all keys. The arrow keys move the selection. */
function keyStrip(app) {
  const path = () => blockPath(app, "attn.weights");
  const strip = new Strip({
    label: "",
    cell: 22,
    describe: (s) => pairText(app, app.trace.idx, app.trace.idx, app.at.t, s, strip.values[s]),
    onSelect: (s) => app.open(`${path()}:${app.at.head},${app.at.t},${s}`),
  });
  const update = () => {
    const row = attentionOf(app, "attn").weights[app.at.head][app.at.t];
    const keyCount = row.length === 1 ? "the key" : `all ${row.length} keys`;
    strip.relabel(`${keyCount} of position ${app.at.t}, ${tokenName(app, app.at.t)}`);
    strip.show(Array.from(row), { columns: row.length, selected: Math.min(app.at.key, row.length - 1), part: path() });
  };
  return { root: strip.root, update };
}

function pairText(app, rows, keys, t, s, weight) {
  if (!Number.isFinite(weight)) return "a later key: masked";
  return `${tokenName(app, t, rows)} ${t} attends to ${tokenName(app, s, keys)} ${s}: ${digits(weight)}`;
}

/** The weights of one head around the selected pair, queries by keys. */
function attentionMatrix(app, branch, { label = null, encoder = false } = {}) {
  const cross = branch === "cross_attn";
  const rows = () => (encoder ? app.source : app.trace.idx);
  const keys = () => (cross ? app.source : rows());
  const path = () => (encoder ? `source.encoder.blocks.${app.at.layer}.attn` : blockPath(app, branch));
  const names = (idx, from, n) => Array.from(idx.slice(from, from + n), (id) => shown(app.tokenizer, id));
  const region = { row: 0, column: 0, rows: 0, columns: 0 };
  const pair = (i) => [region.row + Math.floor(i / region.columns), region.column + (i % region.columns)];
  const strip = new Strip({
    label: "",
    square: 24,
    columns: 1,
    labels: () => ({
      rows: names(rows(), region.row, region.rows),
      columns: names(keys(), region.column, region.columns),
    }),
    describe: (i) => pairText(app, rows(), keys(), ...pair(i), strip.values[i]),
    onSelect: (i) => app.open(`${path()}.weights:${app.at.head},${pair(i)}`),
    step: encoder
      ? null
      : (dx, dy) => {
          const from = selectedPair();
          const t = from[0] + dy;
          const s = dy && !cross ? Math.min(from[1], t) : from[1] + dx; // upwards from the diagonal: along it
          if (s < 0 || t < 0 || t >= rows().length || s >= (cross ? keys().length : t + 1)) return;
          app.open(`${path()}.weights:${app.at.head},${t},${s}`);
          update(); // immediately, because the next key depends on it
        },
  });
  const selectedPair = () => {
    if (!encoder) return [app.at.t, Math.min(app.at.key, cross ? keys().length - 1 : app.at.t)];
    const { path: chosen, at } = parseAddress(app.at.number ?? ":");
    return chosen === `${path()}.weights` && at[0] === app.at.head ? at.slice(1) : [-1, -1];
  };
  /** The start of a region that contains the selected index. It stays where it is if it can. */
  const place = (selected, n, first, wanted) => {
    const size = Math.min(n, regionSize());
    const stays = selected < 0 || (selected >= first && selected < first + size);
    return [Math.min(Math.max(stays ? first : wanted, 0), n - size), size];
  };
  const update = () => {
    const [t, s] = selectedPair();
    const size = regionSize();
    const near = !cross && t - s < size; // then both fit into a square at the diagonal
    [region.row, region.rows] = place(t, rows().length, region.row, t - size + 1);
    [region.column, region.columns] = place(s, keys().length, region.column, near ? t - size + 1 : s - (size >> 1));
    const rowsShown = lookUp(app.trace, path()).weights[app.at.head].slice(region.row, region.row + region.rows);
    const cells = Array.from({ length: region.columns }, (_, i) => region.column + i);
    const values = rowsShown.flatMap((row) => cells.map((column) => row[column] ?? NaN));
    const scales = rowsShown.map((row) => largest(row));
    const range = (first, n) => `${first} to ${first + n - 1}`;
    const shownRows = `queries ${range(region.row, region.rows)}, keys ${range(region.column, region.columns)}`;
    const whole = region.rows === rows().length && region.columns === keys().length;
    const name = `layer ${app.at.layer + 1}, head ${app.at.head + 1}: each row is a query, each column a key`;
    strip.relabel(`${label ?? name}${whole ? "" : ` (${shownRows})`}`);
    const selected = t < 0 ? -1 : (t - region.row) * region.columns + s - region.column;
    strip.show(values, { columns: region.columns, selected, part: `${path()}.weights`, scales });
  };
  return { root: strip.root, update };
}

// --------------------------------------------------------------------------------------
// Lines

const STEP = 22; // pixels between tokens

/** Tokens side by side. A click selects one. */
function tokenLabels(app, idx, from, n, y, { chosen, onPick }) {
  return Array.from({ length: n }, (_, i) => {
    const text = shown(app.tokenizer, idx[from + i]).slice(0, 3);
    const label = svg("text", { x: (i + 0.5) * STEP, y, class: from + i === chosen ? "chosen" : "" }, text);
    label.addEventListener("click", () => onPick(from + i));
    return label;
  });
}

/** A drawing that fills the width. draw(n): [elements, columns, height, text]; n: the number of tokens that fit. */
function drawing(draw) {
  const root = h("div", { class: "arcs" });
  const update = () => {
    const [elements, columns, height, label] = draw(Math.max(Math.floor((root.clientWidth || 600) / STEP), 4));
    const picture = svg("svg", { width: columns * STEP, height, role: "img", "aria-label": label });
    picture.append(...elements);
    root.replaceChildren(picture);
  };
  return { root, update };
}

/** Arcs from the selected token to the tokens that it reads. Their thickness is the weight, relative to the largest. */
function arcs(app) {
  return drawing((fits) => {
    const { t, key, head: chosen } = app.at;
    const row = attentionOf(app, "attn").weights[chosen][t];
    const n = Math.min(fits, t + 1);
    const from = t + 1 - n;
    const most = largest(row);
    const height = Math.min(30 + n * 5, 130);
    const x = (s) => (s - from + 0.5) * STEP;
    const lines = [];
    for (let s = from; s <= t; s++) {
      const part = row[s] / most;
      if (part < 0.02) continue;
      const top = height - 26 - Math.min((t - s + 1) * 9, height - 34) * 1.25;
      const apart = s === t ? 5 : 0; // an arc to the token itself is a loop
      const [left, right] = [x(s) - apart, x(t) + apart];
      const d = `M${right} ${height - 24} C${right + apart} ${top} ${left - apart} ${top} ${left} ${height - 24}`;
      const look = { "stroke-width": 0.75 + 4 * part, opacity: 0.25 + 0.75 * part };
      lines.push(svg("path", { d, class: s === key ? "arc chosen" : "arc", ...look }));
    }
    const pick = { chosen: t, onPick: (s) => app.select({ key: s }) };
    const labels = tokenLabels(app, app.trace.idx, from, n, height - 8, pick);
    labels[key - from]?.classList.add("key");
    const strongest = likeliest(row, Math.min(3, row.length)).map(
      (s) => `${tokenName(app, s)} ${s}, ${percent(row[s])}`,
    );
    return [[...lines, ...labels], n, height, `${tokenName(app, t)} attends most to ${strongest.join("; ")}`];
  });
}

/** Lines from each token of the translation to the tokens of the source that it reads. */
function alignment(app) {
  return drawing((fits) => {
    const { t, key, head: chosen } = app.at;
    const { weights } = attentionOf(app, "cross_attn");
    const place = (selected, length) => {
      const n = Math.min(fits, length);
      return [Math.min(Math.max(selected - (n >> 1), 0), length - n), n];
    };
    const [sourceFrom, sources] = place(Math.min(key, app.source.length - 1), app.source.length);
    const [from, n] = place(t, app.trace.idx.length);
    const lines = [];
    for (let row = from; row < from + n; row++) {
      const [strongest] = likeliest(weights[chosen][row], 1);
      for (let s = sourceFrom; s < sourceFrom + sources; s++) {
        const weight = weights[chosen][row][s];
        if (weight < 0.2 && s !== strongest) continue;
        const ends = { x1: (s - sourceFrom + 0.5) * STEP, y1: 24, x2: (row - from + 0.5) * STEP, y2: 96 };
        const look = { "stroke-width": 0.75 + 3 * weight, opacity: row === t ? 1 : 0.15 + 0.6 * weight };
        lines.push(svg("line", { ...ends, class: row === t ? "arc chosen" : "arc", ...look }));
      }
    }
    const pickKey = { chosen: key, onPick: (s) => app.select({ key: s }) };
    const pickToken = { chosen: t, onPick: (row) => app.select({ t: row }) };
    const top = tokenLabels(app, app.source, sourceFrom, sources, 16, pickKey);
    const bottom = tokenLabels(app, app.trace.idx, from, n, 112, pickToken);
    const label = "lines from the tokens of the translation, below, to those of the source that they read";
    return [[...lines, ...top, ...bottom], Math.max(sources, n), 120, label];
  });
}

// --------------------------------------------------------------------------------------
// The sections

function attentionPanel(app) {
  const heads = ["key", "q·k", "/ √D", "+ mask", "softmax"];
  return [
    sentence(() => attentionText(app)),
    headGrid(app, "attn"),
    controlRow(layerPicker(app), headPicker(app)),
    arcs(app),
    keyStrip(app),
    attentionMatrix(app, "attn"),
    sentence(
      () =>
        `Query: position ${app.at.t}, ${tokenName(app, app.at.t)}. Key: position ${app.at.key}, ` +
        `${tokenName(app, Math.min(app.at.key, app.at.t))}. Select a cell, or walk with the arrow keys.`,
    ),
    pairStrips(app),
    h("p", {}, WHY_ROOT),
    drawn(() => table("One query, step by step; the mask: −∞ for later tokens", heads, queryRows(app), [1, 2, 3, 4])),
    rowStrip(app, "weighted values of all heads, side by side", () => blockPath(app, "attn.heads")),
    rowStrip(app, "after the projection: what attention adds", () => blockPath(app, "attn.o_proj")),
  ];
}

function attentionText(app) {
  const { t, layer, head: chosen } = app.at;
  const row = attentionOf(app, "attn").weights[chosen][t];
  const best = likeliest(row, Math.min(3, row.length)).map((s) => `${tokenName(app, s)} (${percent(row[s])})`);
  return `In layer ${layer + 1}, head ${chosen + 1}, ${tokenName(app, t)} reads most from ${best.join(", ")}.`;
}

/** Query, key and value of the chosen pair, in the chosen head only. */
function pairStrips(app) {
  const size = headSize(app.config);
  const make = (label, name, token, from) =>
    rowStrip(app, label, () => blockPath(app, `attn.${name}`), { token, from, size });
  const query = () => app.at.t;
  const key = () => Math.min(app.at.key, app.at.t);
  const shared = () => keyStart(app.config, app.at.head);
  const normed = app.config.qk_norm ? ", normalised" : "";
  const rotated = app.config.position === "rotary" ? " and rotated by its position" : "";
  const made = `${normed}${normed ? rotated : rotated.replace(" and", ",")}`;
  const own = () => app.at.head * size;
  return [
    made && make("q of the query, as projected", "q_proj", query, own),
    made && make("k of the key, as projected", "k_proj", key, shared),
    make(`q of the query${made}`, "q", query, own),
    make(`k of the key${made}`, "k", key, shared),
    make("v of the key", "v", key, shared),
  ];
}

function queryRows(app) {
  const { t, head: chosen } = app.at;
  const key = Math.min(app.at.key, t);
  const { scores, weights } = attentionOf(app, "attn");
  const { mask } = lookUp(app.trace, app.stack);
  const most = likeliest(weights[chosen][t], 8);
  if (!most.includes(key)) most.splice(7, 1, key);
  const D = headSize(app.config);
  const address = (name, s) => `${blockPath(app, `attn.${name}`)}:${chosen},${t},${s}`;
  const link = (name, s, value) => button(digits(value), () => app.open(address(name, s)), { class: "operand" });
  return most.map((s) => [
    h("code", { class: s === key ? "chosen" : null }, `${s} ${shown(app.tokenizer, app.trace.idx[s])}`),
    digits(scores[chosen][t][s] * Math.sqrt(D)),
    link("scores", s, scores[chosen][t][s]),
    digits(scores[chosen][t][s] + mask[chosen % mask.length][t][s]),
    link("weights", s, weights[chosen][t][s]),
  ]);
}

function headsPanel(app) {
  const text =
    `Each head projects all ${app.config.n_embd} features to a query, a key and a value of its own, ` +
    `of ${headSize(app.config)} features each; the outputs of the heads lie side by side and go through a projection.`;
  const grid = headGrid(app, "attn", { oneLayer: true });
  return [h("p", {}, text), grid, controlRow(layerPicker(app)), attentionMatrix(app, "attn")];
}
