/* The building blocks of panels: elements, controls, and strips of numbers, in which each number is a coloured cell. */

const SVG = new DOMParser().parseFromString("<svg></svg>", "text/html").querySelector("svg").namespaceURI;

function svg(tag, attributes, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

/** Redraw the contents of an element and keep the focus at its place. fromEnd: of a list that grows at its start. */
function keepFocus(root, draw, fromEnd = false) {
  const items = () => [...root.querySelectorAll("button:not([disabled]), [tabindex], summary, select, input")];
  const all = () => (fromEnd ? items().reverse() : items());
  const at = all().indexOf(document.activeElement);
  draw();
  const title = root.closest("section")?.querySelector("h2");
  if (at >= 0) (all()[at] ?? all().at(-1) ?? title)?.focus({ preventScroll: true });
}

/** Resolves after n frames are painted. */
async function frames(n) {
  while (n--) await new Promise(requestAnimationFrame);
}

/** A number with two decimals, and with its sign unless it is shown as 0.00. */
function signed2(x) {
  const size = Math.abs(x).toFixed(2);
  return `${+size ? (x < 0 ? "−" : "+") : ""}${size}`;
}

let controls = 0;

/** A labelled select. options: texts; their numbers are the values. */
function picker(label, options, value, onPick) {
  const id = `control-${controls++}`;
  const items = options.map((text, i) => h("option", { value: i, selected: i === value }, text));
  const select = h("select", { id, onchange: () => onPick(+select.value) }, items);
  const root = h("span", { class: "control" }, h("label", { for: id }, label), select);
  root.set = (number) => (select.value = number);
  return root;
}

/** A labelled range with its value beside it. format: value => text. set(value, max): sets both. */
function slider(label, { min, max, step, value, format = String }, onSlide) {
  const id = `control-${controls++}`;
  const shown = h("output", { for: id }, format(value));
  const input = h("input", { id, type: "range", min, max, step, value });
  const root = h("span", { class: "control" }, h("label", { for: id }, label), input, shown);
  root.set = (number, most = input.max) => {
    Object.assign(input, { max: most, value: number });
    shown.textContent = format(number);
    input.setAttribute("aria-valuetext", shown.textContent);
  };
  input.oninput = () => {
    root.set(+input.value);
    onSlide(+input.value);
  };
  return root;
}

function toggle(label, checked, onToggle) {
  const input = h("input", { type: "checkbox", onchange: () => onToggle(input.checked) });
  input.checked = checked;
  return h("label", { class: "control" }, input, label);
}

/** A table of texts and elements. numeric: the columns that are aligned as numbers. */
function table(caption, heads, rows, numeric = []) {
  const kind = (i) => (numeric.includes(i) ? "number" : null);
  const head = heads.map((text, i) => h("th", { scope: "col", class: kind(i) }, text));
  const cells = (row) => row.map((cell, i) => h("td", { class: kind(i) }, cell));
  const body = rows.map((row) => h("tr", {}, cells(row)));
  const made = h("table", { "aria-label": caption }, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body));
  const title = h("p", { class: "note", "aria-hidden": "true" }, caption);
  return h("div", { class: "captioned" }, title, scrolling(caption, made));
}

/** The place of a table that is too large for it: it has the focus, so that the arrow keys scroll it. */
function scrolling(label, contents) {
  return h("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": label }, contents);
}

// --------------------------------------------------------------------------------------
// Colour: blue below zero, orange above, the colour of the surface at zero

/** As in style.css; canvases have no variables. */
const COLOURS = {
  light: { negative: [28, 98, 176], zero: [238, 240, 242], positive: [200, 84, 16], ink: "#16191d", line: "#5c6670" },
  dark: { negative: [98, 168, 240], zero: [38, 42, 48], positive: [246, 150, 74], ink: "#eef1f4", line: "#9aa5b1" },
};
const darkScheme = matchMedia("(prefers-color-scheme: dark)");
const palette = () => COLOURS[darkScheme.matches ? "dark" : "light"];

/** RGB of x in [-1, 1]. */
function colourOf(x, { negative, zero, positive } = palette()) {
  const end = x < 0 ? negative : positive;
  const part = Math.min(Math.abs(x), 1);
  return end.map((value, i) => Math.round(zero[i] + (value - zero[i]) * part));
}

/** The colours of 511 numbers from -1 to 1, for canvases. */
function colourTable() {
  const chosen = palette();
  return (chosen.table ??= Array.from({ length: 511 }, (_, i) => colourOf((i - 255) / 255, chosen)));
}

const strips = new Set();
const waiting = new Set(); // strips to be drawn at the next frame
const TALLEST = 640; // the largest height of a matrix, in pixels
const LABEL = "12px ui-monospace, 'DejaVu Sans Mono', monospace";
const SMALLEST = 13; // the smallest height of a cell with a label, in pixels
const short = (text) => (text.length > 9 ? `${text.slice(0, 8)}…` : text);

/** A grid of numbers on a canvas. The arrow keys move the selection, and only the selected number is shown in digits.

options: label; columns (0: as many as fit); unit: what an index counts;
describe(index): text of a cell, instead; onSelect(index); part: the path in the trace that these numbers are of;
square: largest width of square cells; labels(): of a matrix, texts of its rows and columns; step(dx, dy): moves the
selection instead, of a matrix that shows a region of a larger one. */
class Strip {
  constructor(options) {
    this.options = { columns: 0, unit: "feature", describe: null, onSelect: null, part: null, ...options };
    this.values = [];
    this.selected = this.hovered = -1;
    this.canvas = h("canvas", {
      tabindex: 0,
      role: "slider",
      "aria-label": options.label,
      "aria-valuemin": 0,
      onkeydown: (event) => this.key(event),
      onpointermove: (event) => this.hover(this.indexAt(event)),
      onpointerleave: () => this.hover(-1),
      onclick: (event) => this.pick(this.indexAt(event)),
      onfocus: () => this.light(true),
      onblur: () => this.light(false),
    });
    this.title = h("span", { class: "quiet" }, options.label);
    this.readout = h("b");
    this.range = h("span", { class: "range quiet" });
    const head = h("div", { class: "strip-head" }, this.title, this.range, this.readout);
    this.root = h("div", { class: "strip" }, head, this.canvas);
    new ResizeObserver(() => this.draw()).observe(this.root);
    strips.add(this);
  }

  relabel(label) {
    this.title.textContent = label;
    this.canvas.setAttribute("aria-label", label);
  }

  /** values: numbers, or NaN for none. scales: the scale of each row; by default max for all, or the largest absolute
  value. note: text after the scale. */
  show(values, { selected, scales = null, max = 0, note = "", ...changed } = {}) {
    const { part, columns } = { ...this.options, ...changed };
    this.values = values;
    this.options.part = part;
    this.options.columns = columns;
    this.mark();
    selected ??= this.options.onSelect ? -1 : this.selected;
    this.selected = selected >= 0 && selected < values.length ? selected : -1;
    this.scales = scales;
    const known = values.filter(Number.isFinite);
    this.max = max || known.reduce((most, x) => Math.max(most, Math.abs(x)), 0) || 1;
    const scale = `${known.some((x) => x < 0) ? "±" : "0 to "}${minus(+this.max.toPrecision(3))}`;
    this.range.textContent = scales ? "each row to its largest" : `${scale}${note}`;
    this.canvas.setAttribute("aria-valuemax", Math.max(values.length - 1, 0));
    this.read();
    this.draw();
  }

  text(index) {
    if (index < 0 || index >= this.values.length) return "";
    return this.options.describe?.(index) ?? `${this.options.unit} ${index}: ${digits(this.values[index])}`;
  }

  read() {
    const index = this.hovered >= 0 ? this.hovered : this.selected;
    this.readout.textContent = this.text(index);
    this.canvas.setAttribute("aria-valuenow", Math.max(this.selected, 0));
    this.canvas.setAttribute("aria-valuetext", this.text(this.selected) || "none selected");
  }

  layout() {
    const width = this.title.parentElement.clientWidth;
    const n = this.values.length;
    if (!width || !n) return null;
    const rows = this.options.columns ? Math.ceil(n / this.options.columns) : Math.ceil((n * 5) / width);
    const columns = this.options.columns || Math.ceil(n / rows);
    if (!this.options.square)
      return { rows, columns, left: 0, top: 0, width: Math.min(width, columns * 24), height: 14 * rows };
    const side = (room) => Math.min(Math.max(Math.min(room / columns, TALLEST / rows), 1), this.options.square);
    const margin = this.options.labels && side(width) >= SMALLEST ? this.margin() : null;
    const labelled = margin && side(width - margin.left) >= SMALLEST;
    const { left, top } = labelled ? margin : { left: 0, top: 0 };
    const cell = side(width - left);
    return { rows, columns, left, top, width: cell * columns, height: cell * rows };
  }

  /** The space in pixels that the labels take beside and above the cells. */
  margin() {
    const context = this.canvas.getContext("2d");
    context.font = LABEL;
    const longest = (texts) => Math.ceil(Math.max(...texts.map((text) => context.measureText(short(text)).width)));
    const { rows, columns } = this.options.labels();
    const across = longest(columns);
    return { left: longest(rows) + 6, top: across < SMALLEST ? 18 : across + 6 };
  }

  /** Draw at the next frame, together with the other strips. All are measured before the first is drawn. */
  draw() {
    if (!waiting.size) requestAnimationFrame(paintWaiting);
    waiting.add(this);
  }

  paint() {
    const { canvas, values, max, scales } = this;
    const { rows, columns, left, top, width, height } = this.size;
    const ratio = devicePixelRatio || 1;
    canvas.width = Math.round((left + width) * ratio);
    canvas.height = Math.round((top + height) * ratio);
    canvas.style.width = `${left + width}px`;
    canvas.style.height = `${top + height}px`;
    const small = new OffscreenCanvas(columns, rows);
    paintCells(small, rows, columns, (row, column) => values[row * columns + column] / (scales?.[row] ?? max));
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.scale(ratio, ratio);
    context.drawImage(small, left, top, width, height);
    if (top) this.label(context);
    this.outline(context, this.selected, 2);
    if (this.hovered !== this.selected) this.outline(context, this.hovered, 1);
  }

  outline(context, index, thickness) {
    if (index < 0) return;
    const { rows, columns, left, top, width, height } = this.size;
    const [w, t] = [width / columns, height / rows];
    const [x, y] = [left + (index % columns) * w, top + Math.floor(index / columns) * t];
    context.strokeStyle = palette().ink;
    context.lineWidth = thickness;
    const half = thickness / 2;
    context.strokeRect(x + half, y + half, Math.max(w - thickness, 1), Math.max(t - thickness, 1));
  }

  /** Labels of rows at the left, of columns above, vertical if longer than a character. Selected ones are darker. */
  label(context) {
    const { columns, left, top, width } = this.size;
    const cell = width / columns;
    const labels = this.options.labels();
    const colour = (chosen) => (context.fillStyle = chosen ? palette().ink : palette().line);
    Object.assign(context, { font: LABEL, textBaseline: "middle", textAlign: "right" });
    labels.rows.forEach((text, row) => {
      colour(row === Math.floor(this.selected / columns));
      context.fillText(short(text), left - 4, top + (row + 0.5) * cell);
    });
    labels.columns.forEach((text, column) => {
      colour(column === this.selected % columns);
      context.save();
      context.translate(left + (column + 0.5) * cell, top - 4);
      if (top > 18) context.rotate(-Math.PI / 2);
      Object.assign(context, top > 18 ? { textAlign: "left" } : { textAlign: "center", textBaseline: "bottom" });
      context.fillText(short(text), 0, 0);
      context.restore();
    });
  }

  indexAt(event) {
    if (!this.size) return -1;
    const { rows, columns, left, top, width, height } = this.size;
    if (event.offsetX < left || event.offsetY < top) return -1;
    const column = Math.min(Math.floor(((event.offsetX - left) / width) * columns), columns - 1);
    const row = Math.min(Math.floor(((event.offsetY - top) / height) * rows), rows - 1);
    const index = row * columns + column;
    return index < this.values.length ? index : -1;
  }

  hover(index) {
    if (index === this.hovered) return;
    this.hovered = index;
    this.read();
    this.draw();
    this.light(index >= 0);
  }

  /** Mark the strips that these numbers are computed from. */
  light(on) {
    lightDependencies(on ? this.options.part : null);
  }

  mark() {
    const { part } = this.options;
    this.root.classList.toggle("lit", lit.read.includes(part));
    this.root.classList.toggle("origin", part === lit.origin && lit.read.length > 0);
  }

  /** The distance in pixels from the top of the window to the end of the selected cell. */
  selectedBottom() {
    const { rows, columns, top, height } = this.size;
    const row = Math.floor(this.selected / columns) + 1;
    return this.canvas.getBoundingClientRect().top + top + (row * height) / rows;
  }

  pick(index) {
    if (index < 0 || (this.options.onSelect && !Number.isFinite(this.values[index]))) return;
    this.selected = index;
    this.read();
    this.draw();
    this.options.onSelect?.(index);
  }

  key(event) {
    if (!this.size || event.ctrlKey || event.metaKey || event.altKey) return;
    const { columns } = this.size;
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (this.options.step && event.key in steps) {
      event.preventDefault();
      return this.options.step(...steps[event.key]);
    }
    const last = this.values.length - 1;
    const from = Math.max(this.selected, 0);
    const [dx, dy] = steps[event.key] ?? [];
    const to = { Home: 0, End: last, Enter: from, " ": from }[event.key] ?? from + dx + dy * columns;
    if (Number.isNaN(to)) return;
    event.preventDefault();
    if (to >= 0 && to <= last) this.pick(to);
  }
}

function paintWaiting() {
  const ready = [...waiting];
  waiting.clear();
  for (const strip of ready) strip.size = strip.layout();
  for (const strip of ready) if (strip.size) strip.paint();
}

/** Set by the page, which has the model and the picture. */
let dependenciesOf = () => [];
let onLight = () => {};
let opened = null; // the part of the number in the drawer
let lit = { origin: null, read: [] }; // the parts that are marked

/** Mark the strips and parts of the picture that `part` reads; null: that the number in the drawer reads. */
function lightDependencies(part) {
  const origin = part ?? opened;
  lit = { origin, read: origin ? dependenciesOf(origin) : [] };
  for (const strip of strips) strip.mark();
  onLight(lit.origin, lit.read);
}

// --------------------------------------------------------------------------------------
// Curves

/** Lines over steps. lines: {name, points: [x, y], colour: 0, 1 or the name of one}; level: {name, y}, a horizontal line. */
class Chart {
  constructor(label) {
    this.picture = svg("svg", { role: "img", "aria-label": label, class: "chart" });
    this.key = h("p", { class: "chart-key note" });
    this.root = h("div", {}, this.picture, this.key);
    this.lines = [];
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  /** most: larger numbers are drawn at the upper edge. */
  show(lines, level, most = Infinity) {
    Object.assign(this, { lines, level, most });
    const names = lines.map(({ name, colour, points }) =>
      h("span", { class: `key-${colour}` }, `${name}, ${+points.at(-1)[1].toPrecision(4)} at the end`),
    );
    this.key.replaceChildren(...names, h("span", { class: "key-level" }, level.name));
    this.draw();
  }

  draw() {
    const [width, height] = [this.root.clientWidth, 180];
    const clipped = ([x, y]) => [x, Math.min(y, this.most)];
    const lines = this.lines.map((line) => ({ ...line, points: line.points.map(clipped) }));
    const points = lines.flatMap((line) => line.points);
    if (!width || !points.length) return;
    const x1 = Math.max(...points.map(([x]) => x), 1);
    const all = [...points.map(([, y]) => y), this.level.y];
    const y1 = Math.max(...all) * 1.03 || 1;
    const y0 = Math.min(...all) > 0.3 * y1 ? Math.min(...all) * 0.97 : 0; // a scale from 0 would flatten the lines
    const at = ([x, y]) => [44 + (x / x1) * (width - 56), height - 22 - ((y - y0) / (y1 - y0)) * (height - 32)];
    // h2: the end is 2 pixels longer, so that a single point is seen, too
    const line = (ends, name) => svg("path", { class: name, d: `M${ends.map(at).join("L")}h2` });
    const level = [0, x1].map((x) => [x, this.level.y]);
    const ticks = [0, 0.25, 0.5, 0.75, 1].map((part) => {
      const y = y0 + part * (y1 - y0);
      return svg("text", { x: 40, y: at([0, y])[1] + 4 }, +y.toPrecision(y1 - y0 < 0.3 * y1 ? 3 : 2));
    });
    this.picture.replaceChildren(
      svg("path", { class: "axes", d: `M44.5 10.5V${height - 21.5}H${width - 11.5}` }),
      svg("text", { x: width - 10, y: height - 6 }, `step ${x1.toLocaleString("en")}`),
      ...ticks,
      line(level, "key-level"),
      ...lines.map((each) => line(each.points, `key-${each.colour}`)),
    );
  }
}
