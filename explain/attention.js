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
// Arcs

const STEP = 22; // pixels between tokens

/** Arcs from the selected token to the tokens that it reads, as many as fit. Their thickness is the weight, relative to
the largest. A click on a token selects it as the key. */
function arcs(app) {
  const root = h("div", { class: "arcs" });
  const update = () => {
    const { t, key, head: chosen } = app.at;
    const row = attentionOf(app, "attn").weights[chosen][t];
    const n = Math.min(Math.max(Math.floor((root.clientWidth || 600) / STEP), 4), t + 1);
    const from = t + 1 - n;
    const most = largest(row);
    const height = Math.min(30 + n * 5, 130);
    const x = (s) => (s - from + 0.5) * STEP;
    const strongest = likeliest(row, Math.min(3, row.length)).map(
      (s) => `${tokenName(app, s)} ${s}, ${percent(row[s])}`,
    );
    const label = `${tokenName(app, t)} attends most to ${strongest.join("; ")}`;
    const picture = svg("svg", { width: n * STEP, height, role: "img", "aria-label": label });
    for (let s = from; s <= t; s++) {
      const text = shown(app.tokenizer, app.trace.idx[s]).slice(0, 3);
      const name = s === key ? "key" : s === t ? "chosen" : "";
      const token = svg("text", { x: x(s), y: height - 8, class: name }, text);
      token.addEventListener("click", () => app.select({ key: s }));
      picture.append(token);
      const part = row[s] / most;
      if (part < 0.02) continue;
      const top = height - 26 - Math.min((t - s + 1) * 9, height - 34) * 1.25;
      const apart = s === t ? 5 : 0; // an arc to the token itself is a loop
      const [left, right] = [x(s) - apart, x(t) + apart];
      const d = `M${right} ${height - 24} C${right + apart} ${top} ${left - apart} ${top} ${left} ${height - 24}`;
      const look = { "stroke-width": 0.75 + 4 * part, opacity: 0.25 + 0.75 * part };
      picture.append(svg("path", { d, class: s === key ? "arc chosen" : "arc", ...look }));
    }
    root.replaceChildren(picture);
  };
  return { root, update };
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
    attentionMatrix(app, "attn"),
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
