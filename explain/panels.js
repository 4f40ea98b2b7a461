/* What sections are built of: parts, which are elements, or {root, update()}, which draws root for the text and the
selection of now. sections.js has the list of the sections. */

/** Several parts as one, in an element of this class. */
function group(className, ...parts) {
  const present = parts.flat(Infinity).filter(Boolean);
  const root = h("div", { class: className }, present.map((part) => part.root ?? part));
  return { root, update: () => present.forEach((part) => part.update?.()) };
}
const controlRow = (...parts) => group("controls", parts);

/** An element that is drawn by f() at each update. */
function drawn(f, attributes = {}) {
  const root = h("div", { class: "drawn", ...attributes });
  const draw = () => root.replaceChildren(...[f()].flat().filter(Boolean));
  return { root, update: () => keepFocus(root, draw) };
}

/** An element that draw(answer, then) draws from the worker's answer to question(), or from null before there is one.

then: the app with the text and the selection that the question was about. While the model writes, answers come later
than tokens, and each is drawn with its own text. */
function answered(app, topic, question, draw) {
  let [answer, then] = [null, app];
  let [asked, drawnFor] = ["null", "null"];
  let waiting = false;
  const result = drawn(() => draw(answer, then));
  const take = (...taken) => {
    [answer, then, drawnFor] = taken;
    waiting = false;
    result.root.classList.remove("outdated");
    result.update();
  };
  const update = async () => {
    const now = question() || null;
    const text = JSON.stringify(now && [app.version, now]);
    const view = Object.assign(Object.create(app), { trace: app.trace, at: app.at });
    if (!now || text === drawnFor) {
      asked = text;
      return take(now && answer, view, text);
    }
    if (!answer) {
      then = view;
      result.update();
    }
    result.root.classList.add("outdated");
    if (text === asked || (waiting && app.going)) return; // a newer question would drop this one
    asked = text;
    waiting = true;
    const found = await app.desk.ask(topic, now);
    if (asked !== text) return;
    take(found, view, text);
  };
  return { root: result.root, update };
}

function sentence(f) {
  return drawn(() => h("p", {}, f()), { class: "text" });
}

/** Parts in rows: texts, and what they are about, which is beside them where there is room. */
function inRows(parts) {
  const rows = [];
  for (const part of parts.flat(Infinity).filter(Boolean)) {
    const isText = (part.root ?? part).matches("p, .text, .head-grid");
    if (!rows.length || (isText && rows.at(-1)[1].length)) rows.push([[], []]);
    rows.at(-1)[isText ? 0 : 1].push(part);
  }
  return rows.map(([texts, shown]) => group("row drawn", group("texts drawn", texts), group("drawn", shown)));
}

/** A strip of the selected token's row of the trace. Each cell opens its arithmetic.

pathOf(): null hides it. scale(): the number that its colours end at. from(): the first of `size` numbers. */
function rowStrip(app, label, pathOf, options = {}) {
  const { unit = "feature", token = () => app.at.t, scale = null, from = () => 0, size = Infinity } = options;
  const onSelect = (i) => app.open(`${pathOf()}:${token()},${from() + i}`);
  const strip = new Strip({ label, unit, onSelect });
  const update = () => {
    const path = pathOf();
    const row = path && lookUp(app.trace, path)?.[token()];
    strip.root.hidden = !row;
    if (!row) return;
    const common = scale && { max: scale(), note: `, length (L2) ${digits(Math.hypot(...row))}` };
    const selected = app.selectedIn(path, token()) - from();
    strip.show(Array.from(row).slice(from(), from() + size), { part: app.resolvePath(path), selected, ...common });
  };
  return { root: strip.root, update };
}

/** A strip of trained numbers, one for each feature. Each opens the number that is computed from it. */
function weightStrip(app, label, name, path) {
  const open = (i) => app.open(`${path()}.output:${app.at.t},${i}`);
  const strip = new Strip({ label: h("b", { class: "weight" }, label), onSelect: open });
  strip.canvas.setAttribute("aria-label", label);
  const update = () => {
    const selected = app.selectedIn(`${path()}.output`, app.at.t);
    strip.show(Array.from(lookUp(app.model.weights, path())[name].data), { selected });
  };
  return { root: strip.root, update };
}

/** A choice among n layers or heads. name: its key in the state. */
function numberPicker(app, label, name, n) {
  const options = Array.from({ length: n }, (_, i) => `${i + 1}`);
  const root = picker(label, options, app.at[name], (i) => app.select({ [name]: i, number: null }));
  return { root, update: () => root.set(app.at[name]) };
}
const layerPicker = (app) => numberPicker(app, "Layer", "layer", app.config.n_layer);
const headPicker = (app) => numberPicker(app, "Head", "head", app.config.n_head);

const count = (n) => n.toLocaleString("en");
const tokenName = (app, t, idx = app.trace.idx) => `“${shown(app.tokenizer, idx[t])}”`;
const ownBlock = (app) => `${app.stack}.blocks.${app.at.layer}`;
const blockPath = (app, rest) => `${ownBlock(app)}.${rest}`;
