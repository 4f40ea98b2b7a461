/* The picture: the whole model from the text to the next token, with the numbers of the selected token in it.

The residual stream runs through the middle, drawn as its features; above it is what attention adds to it, below it what
the MLP adds. Each part is a button that leads to the section that explains it. */

const still = matchMedia("(prefers-reduced-motion: reduce)");
const PICTURED = { tokens: 6, keys: 32, features: 40, neurons: 32 }; // the most that are shown; neurons: in a row

class Picture {
  constructor(app) {
    this.app = app;
    this.key = h("span");
    const scale = h("span", { class: "legend", "aria-hidden": "true" });
    const range = "+ Blue is negative, orange is positive. Each picture has its own scale. ";
    element("picture-key").replaceChildren("−", scale, range, this.key);
    this.parts = new Map(); // by name: {root, paint()}
    this.flow = element("flow");
    this.flow.replaceChildren();
    const { config, stack } = app;
    this.stage("Tokens", this.part("tokens", "the text", "writing", (part) => this.listTokens(part)));
    const embeddings = ({ canvas }) => paintVectors(canvas, this.lastTokens().map((t) => app.trace.wte[t]));
    const embeds = [this.part("embed", "embedding", "embeddings", embeddings)];
    if (stack && /learned|sinusoidal/.test(config.position))
      embeds.push(this.part("position", config.position, "positions"));
    this.stage("Embedding", ...embeds);
    const encoded = ({ canvas }) => paintVectors(canvas, app.trace.source.encoder.norm.output.slice(-24));
    if (app.encodes) this.stage("Encoder", this.part("encoder", "read once", "transformer", encoded));
    for (let i = 0; i < config.n_layer; i++) this.layer(i);
    const output = ({ canvas }) => paintVectors(canvas, [app.trace.output[app.at.t]]);
    this.stage("Output", this.part("head", "score", "softmax", output));
    app.enterPicture();
    onLight = (origin, read) => this.light(origin, read);
  }

  /** Add a part of the picture. paint(part) draws it for the selected token, on part.canvas and in part.adds. */
  part(name, label, section, paint = null, layer = null) {
    const tag = name === "tokens" ? "span" : "canvas";
    const canvas = paint && h(tag, { "aria-hidden": "true" });
    const adds = h("span", { class: "adds quiet" });
    const where = layer === null ? "" : `Layer ${layer + 1}: `;
    const press = () => this.app.goTo(section, layer === null ? {} : { layer, key: -1 });
    const title = h("span", { class: "part-name" }, h("span", { class: "unseen" }, where), `${label} `, adds);
    const root = button([canvas, title], press, { class: `part ${name.replace(/^\d+\./, "")}` });
    const made = { root, canvas, adds, paint };
    this.parts.set(name, made);
    return root;
  }

  stage(title, ...parts) {
    const name = h("span", { class: "stage-name" }, title);
    this.flow.append(h("li", { class: "stage end" }, name, h("div", { class: "stage-parts" }, parts)));
  }

  layer(i) {
    const { app } = this;
    const title = `Layer ${i + 1}`;
    if (!app.stack) {
      const paint = (part) => this.paintNeurons(part, `layers.${i}.activation`);
      return this.stage(title, this.part(`${i}.mlp`, "neurons", "writing", paint, i));
    }
    const block = `${app.stack}.blocks.${i}`;
    const attend = (branch) => (part) => this.paintHeads(part, `${block}.${branch}`);
    const above = [this.part(`${i}.attn`, "attention", "attention", attend("attn"), i)];
    if (app.encodes) above.push(this.part(`${i}.cross`, "cross", "transformer", attend("cross_attn"), i));
    const neurons = (part) => this.paintNeurons(part, `${block}.feed_forward.hidden`);
    const below = app.config.mlp === "none" ? [] : [this.part(`${i}.mlp`, "MLP", "mlp", neurons, i)];
    const stream = h("canvas", { class: "stream", "aria-hidden": "true" });
    this.parts.set(`${i}.stream`, { root: stream, canvas: stream, paint: (part) => this.paintStream(part, block) });
    const wires = () => h("span", { class: "wires", "aria-hidden": "true" });
    const branch = (parts) => h("div", { class: "branch" }, parts);
    const layer = [h("span", { class: "stage-name" }, title), branch(above), wires(), stream];
    if (below.length) layer.push(wires(), branch(below));
    this.flow.append(h("li", { class: `stage layer${app.encodes ? " wide" : ""}` }, layer));
  }

  update() {
    const { app } = this;
    this.most = this.largestOfStream();
    this.addUp();
    for (const part of this.parts.values()) part.paint?.(part);
    for (const [name, { root }] of this.parts) root.classList.toggle("chosen", name.startsWith(`${app.at.layer}.`));
    const { t } = app.at;
    element("picture-title").textContent =
      `What it computes at position ${t} (from 0), ${tokenName(app, t)}, to find the next token: select any box to see how`;
  }

  /** Light the parts up one after another, on the way of a token, unless the reader wants nothing to move. */
  lightUp() {
    if (still.matches) return;
    const places = [...Array.from(this.parts.values(), ({ root }) => root), element("bars")];
    const glow = { boxShadow: ["0 0 0 4px var(--accent)", "0 0 0 4px transparent"] };
    places.forEach((place, i) => place.animate(glow, { duration: 500, delay: (1200 * i) / places.length }));
  }

  /** Show what each part adds to the logit of the explained next token. The output includes all bias terms. */
  addUp() {
    const { app } = this;
    if (!app.stack) return;
    const { t, next } = app.at;
    const list = contributions(app.model, app.trace, app.stack, t, next);
    let others = 0;
    for (const { layer, branch, path = "", value } of list) {
      const part = this.parts.get(branch ? `${layer}.${branch}` : path === "wte" ? "embed" : "position");
      if (path) part.adds.textContent = signed2(value);
      else others += value;
    }
    const sum = signed2(addUp(list)).replace("+", "");
    this.parts.get("head").adds.textContent = `${others ? signed2(others) : ""} = ${sum}`;
    const name = `“${shown(app.tokenizer, next)}”`;
    this.key.textContent =
      "Attention: a row for each head, a cell for each earlier token. MLP: a cell for each neuron. The stripes are the " +
      "numbers of this token (the residual stream), to which each part adds. The number under a part says by how " +
      `much it directly raises the score (logit) of ${name} above the mean of all tokens; the output has their sum. ` +
      "Softmax turns scores into probabilities.";
  }

  // ----------------------------------------------------------------------------------
  // Pictures of numbers

  largestOfStream() {
    const { app } = this;
    if (!app.stack) return 1;
    return Math.max(...lookUp(app.trace, app.stack).blocks.map(({ output }) => largest(output[app.at.t])));
  }

  /** The residual stream at the start and after each branch: one column each, from left to right. */
  paintStream({ canvas }, block) {
    const { app } = this;
    const steps = ["input", ...branchesOf(app.trace, block).map((branch) => `after_${branch}`)];
    const columns = steps.map((name) => binned(lookUp(app.trace, `${block}.${name}`)[app.at.t], PICTURED.features));
    paintCells(canvas, columns[0].length, columns.length, (row, column) => columns[column][row] / this.most);
  }

  /** A row for each head: its weights over the last keys, scaled to the largest. */
  paintHeads({ canvas }, attention) {
    const { weights } = lookUp(this.app.trace, attention);
    const rows = weights.map((rows) => binned(rows[this.app.at.t], PICTURED.keys));
    const most = rows.map((row) => largest(row));
    paintCells(canvas, rows.length, rows[0].length, (row, column) => rows[row][column] / most[row]);
  }

  paintNeurons({ canvas }, path) {
    const row = lookUp(this.app.trace, path)[this.app.at.t];
    const columns = Math.min(row.length, PICTURED.neurons);
    const most = largest(row);
    paintCells(canvas, Math.ceil(row.length / columns), columns, (y, x) => (row[y * columns + x] ?? 0) / most);
  }

  /** The last tokens up to the selected one. */
  lastTokens() {
    const { t } = this.app.at;
    const from = Math.max(t - PICTURED.tokens + 1, 0);
    return Array.from({ length: t + 1 - from }, (_, i) => from + i);
  }

  listTokens({ canvas: list }) {
    const { app } = this;
    const chosen = (t) => (t === app.at.t ? "chosen" : null);
    const item = (t) => h("code", { class: chosen(t) }, shown(app.tokenizer, app.trace.idx[t]));
    list.replaceChildren(...this.lastTokens().map(item));
  }

  // ----------------------------------------------------------------------------------
  // From numbers to parts of the picture

  /** Mark the part that numbers belong to, and the parts that they are computed from. */
  light(origin, read) {
    const from = new Set(read.map((path) => this.partOf(path)));
    const own = origin && this.partOf(origin);
    for (const [name, { root }] of this.parts) {
      root.classList.toggle("origin", name === own);
      root.classList.toggle("lit", from.has(name) && name !== own);
      if (name === own) this.flow.scrollLeft = root.offsetLeft - this.flow.offsetLeft - this.flow.clientWidth / 3;
    }
  }

  /** The name of the part that a path of the trace belongs to. */
  partOf(path) {
    if (path.startsWith("source")) return "encoder";
    const [, layer, rest = ""] = path.match(/(?:blocks|layers)\.(\d+)\.(.*)$/) ?? [];
    if (layer === undefined && /^(output|logits|probs)|\.norm\./.test(path)) return "head";
    if (layer === undefined) return path.includes("position") ? "position" : "embed";
    if (/^(attn|cross)/.test(rest)) return `${layer}.${rest.match(/^(attn|cross)/)[0]}`;
    return /^(feed_forward|mlp|linear|activation)/.test(rest) ? `${layer}.mlp` : `${layer}.stream`;
  }
}

function largest(row) {
  let most = 1e-9;
  for (let i = 0; i < row.length; i++) most = Math.max(most, Math.abs(row[i]));
  return most;
}

/** Reduce numbers to at most n, each the one among its neighbours that is farthest from zero. */
function binned(row, n) {
  if (row.length <= n) return row;
  return Float32Array.from({ length: n }, (_, i) => {
    const part = row.subarray(Math.floor((i * row.length) / n), Math.floor(((i + 1) * row.length) / n));
    return part.reduce((most, x) => (Math.abs(x) > Math.abs(most) ? x : most), 0);
  });
}

/** Paint a row for each vector, all scaled to the largest number. */
function paintVectors(canvas, vectors) {
  const rows = vectors.map((vector) => binned(vector, PICTURED.features));
  const most = Math.max(...rows.map((row) => largest(row)));
  paintCells(canvas, rows.length, rows[0].length, (row, column) => rows[row][column] / most);
}

/** Paint a pixel for each number from [-1, 1]. */
function paintCells(canvas, rows, columns, value) {
  if (canvas.width !== columns || canvas.height !== rows) Object.assign(canvas, { width: columns, height: rows });
  const colours = colourTable();
  const pixels = new ImageData(columns, rows);
  for (let row = 0, at = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++, at += 4) {
      const x = Math.max(-1, Math.min(1, value(row, column)));
      if (Number.isNaN(x)) continue;
      pixels.data.set(colours[Math.round(255 * x) + 255], at);
      pixels.data[at + 3] = 255;
    }
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}
