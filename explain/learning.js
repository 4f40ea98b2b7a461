"use strict";

/* How the model came to be: the text after each snapshot of its training, one more step of training, and pictures of
how the leaf network learns. */

// --------------------------------------------------------------------------------------
// Snapshots

function learnedPanel(app) {
  const { steps } = app.data;
  let number = Math.min(2, steps.length - 2); // the first snapshot that shows some learning
  let then = app; // with the text that is shown
  const value = (t) => (t ? digits(loss.values[t]) : "nothing predicts it");
  const loss = new Strip({
    label: "Loss of each token, in nats: −ln of the probability that it had",
    describe: (t) => `${tokenName(then, t)}: ${value(t)}`,
  });
  const attention = new Strip({
    label: "Attention of the selected token",
    describe: (s) => `to ${tokenName(then, s)}: ${percent(attention.values[s])}`,
  });
  const embedding = new Strip({ label: "Embedding of the selected token" });
  const question = () => {
    const { t, layer, head } = app.at;
    return { number, idx: app.trace.idx, source: app.source ?? null, t, layer, head };
  };
  const result = answered(app, "learned", question, (answer, asked) => {
    then = asked;
    // show the present model until there is an answer, so that nothing moves
    const { losses, probs, attention: weights, wte } = answer ?? presentNumbers(then);
    loss.show([NaN, ...losses]);
    if (weights) attention.show(Array.from(weights));
    embedding.show(Array.from(wte));
    const heads = [`after step ${count(steps[number])}`, "now"];
    return [
      h("p", { role: "status", "data-loss": meanOf(losses) }, answer ? learnedText(app, steps[number], losses) : "…"),
      lossRow(then, losses),
      loss.root,
      comparison(then, `Next token after position ${then.at.t}`, heads, [probs, then.probs()]),
      weights ? attention.root : null,
      embedding.root,
    ];
  });
  const named = (i) => `${count(steps[i])}${steps[i] ? "" : ", before training"}`;
  const limits = { min: 0, max: steps.length - 1, step: 1, value: number, format: named };
  const step = slider("Step of training", limits, (i) => ((number = i), result.update()));
  return [controlRow(step), app.stack && controlRow(layerPicker(app), headPicker(app)), result];
}

function presentNumbers(app) {
  const { t, head } = app.at;
  const attention = app.stack ? lookUp(app.trace, blockPath(app, "attn.weights"))[head][t] : null;
  return { losses: app.trace.idx.slice(1).fill(NaN), probs: app.probs(), attention, wte: app.trace.wte[t] };
}

function learnedText(app, step, losses) {
  const guessing = Math.log(app.model.tokenizer_vocab_size);
  const rounding = step === app.data.progress.iter ? "" : " Its weights are rounded to 8 bits.";
  if (!losses.length) return "A single token: there is nothing to predict yet." + rounding;
  const guesses = !step && Math.abs(meanOf(losses) - guessing) < 0.01;
  const why = guesses ? " The output head starts at zero, so all tokens are alike." : "";
  return (
    `After step ${count(step)} the mean loss of this text is ${digits(meanOf(losses))}; guessing among all tokens ` +
    `has ${digits(guessing)}, ln of their number.${why}${rounding}`
  );
}

/** The tokens, each underlined in the colour of its loss, from none at 0 to full at the loss of guessing. */
function lossRow(app, losses) {
  const guessing = Math.log(app.model.tokenizer_vocab_size);
  const spans = app.trace.idx.map((id, t) =>
    h("span", { style: t ? tint(losses[t - 1], guessing) : null }, shown(app.tokenizer, id)),
  );
  return h("p", { class: "losses", "aria-hidden": "true" }, spans);
}

// --------------------------------------------------------------------------------------
// One step of training

const RULES = { adamw: "AdamW", muon: "Muon and AdamW", normuon: "NorMuon and AdamW", gradient_descent: "plain" };

const GRADIENT = "The gradient: by how much the loss changes with each weight, its derivative. Select a number.";

/** A copy of the model learns the text, and the gradient by which it does so. */
function stepPanel(app) {
  const rules = [app.data.training.optimizer, "gradient_descent"];
  const state = { optimizer: rules[0], factor: 1, count: 0, text: null, undone: false };
  const asked = () => ({ idx: app.trace.idx, optimizer: state.optimizer, factor: state.factor });
  const question = () => {
    const { idx } = app.trace;
    const text = JSON.stringify(idx);
    if (state.text !== text) Object.assign(state, { text, count: 0, undone: state.count > 0 });
    return idx.length > 1 ? { ...asked(), count: state.count } : null;
  };
  const curve = new Strip({ label: "Mean loss before each step, in nats", unit: "step" });
  const result = answered(app, "descend", question, (answer) => {
    if (!answer?.sizes) {
      const loss = answer ? ` The mean loss of this text is ${digits(meanOf(answer.before.losses))}.` : "";
      const more = app.trace.idx.length < 2 ? " A single token has no loss: type another." : loss;
      const undone = state.undone ? " The text changed, so its steps are undone." : "";
      return h("p", { class: "quiet", role: "status" }, `The weights are those of the run.${undone}${more}`);
    }
    const { before, after, losses, sizes } = answer;
    curve.show([...losses, meanOf(after.losses)]);
    const caption = "The last step: length (L2) of the gradient and the weights, and how far the optimizer moved them";
    const rows = sizes.map(({ name, gradient, weights, moved }) => {
      return [name, digits(gradient), digits(weights), percent(moved / weights)];
    });
    return [
      h("p", { role: "status", "data-loss": meanOf(after.losses) }, trialText(app, state.count, before, after)),
      curve.root,
      comparison(app, "The next token", ["before", "after"], [before.probs, after.probs]),
      table(caption, ["part", "gradient", "weights", "moved"], rows, [1, 2, 3]),
    ];
  });
  const change = (changes) => {
    Object.assign(state, { undone: false }, changes);
    result.update();
    opened.update();
  };
  const take = (steps) => change({ count: Math.max(state.count + steps, 0) });
  const named = rules.map((name) => RULES[name]);
  const rule = picker("Optimizer", named, 0, (i) => change({ optimizer: rules[i], count: 0 }));
  const rates = { min: -2, max: 2, step: 0.1, value: 0, format: (x) => `${(10 ** x).toPrecision(2)} × the run's` };
  const rate = slider("Learning rate", rates, (x) => change({ factor: 10 ** x, count: 0 }));
  const moves = Object.entries({ "Take a step": 1, "Take ten": 10, "Undo a step": -1 });
  const buttons = moves.map(([label, n]) => button(label, () => take(n)));
  const opened = gradientOf(app, asked);
  return [controlRow(rule, rate, buttons), result, h("p", {}, GRADIENT), opened];
}

function trialText(app, steps, before, after) {
  const [was, is] = [before, after].map(({ losses }) => meanOf(losses));
  const guessing = Math.log(app.model.tokenizer_vocab_size);
  const outcome = `${counted(steps, "step")} on this text: its mean loss was ${digits(was)} and is ${digits(is)}.`;
  if (is <= Math.max(was, guessing) + 1)
    return `${outcome} A trial: the picture above still has the weights of the run.`;
  const worse = `It exploded: guessing among all tokens has ${digits(guessing)}.`;
  return `${outcome} ${worse} Each step goes too far, past where the loss is low. Undo, and try a lower rate.`;
}

/** The gradient by one row of any weights, and how far a step moves them. Each number opens to its sum. */
function gradientOf(app, asked) {
  const { names } = app.data;
  const state = { name: names.find((name) => name.endsWith("up_proj.weight")) ?? names[0], row: 0 };
  const path = () => `gradient.weights.${state.name}`;
  const gradient = rowStrip(app, "Derivative of the loss by each weight of this row", path, {
    unit: "input",
    token: () => state.row,
  });
  const moved = new Strip({ label: "How far one step of the optimizer moves each of them", unit: "input" });
  const row = slider("Row", { min: 0, max: 0, step: 1, value: 0 }, (r) => ((state.row = r), show()));
  const show = () => {
    const rows = lookUp(app.trace, path());
    for (const part of [gradient.root, moved.root]) part.hidden = !rows;
    row.hidden = !rows || rows.length === 1;
    if (!rows) return;
    row.querySelector("input").max = rows.length - 1;
    row.set((state.row = Math.min(state.row, rows.length - 1)));
    gradient.update();
    moved.show(Array.from(lookUp(app.trace, path().replace("weights", "moved"))[state.row]));
  };
  const question = () => (app.trace.idx.length > 1 ? asked() : null);
  const result = answered(app, "gradient", question, (answer, then) => {
    if (answer) then.trace.gradient = unpack(answer);
    show();
    return null;
  });
  const short = names.map((name) => name.replace("stack.", ""));
  const weights = picker("Weights", short, names.indexOf(state.name), (i) => ((state.name = names[i]), show()));
  return group("drawn", controlRow(weights, row), gradient, moved, result);
}

// --------------------------------------------------------------------------------------
// The leaf network

const FIELD = 40; // cells across
const LANDSCAPE = 15;

/** A square of numbers from -1 to 1 as colours, with dots on it: [x, y, class], from 0 to 1, y upwards. */
class Field {
  constructor(label) {
    this.canvas = h("canvas", { "aria-hidden": "true" });
    this.dots = svg("svg", { role: "img", "aria-label": label, viewBox: "0 0 1 1" });
    this.caption = h("p", { class: "note" });
    this.root = h("div", {}, h("div", { class: "field" }, this.canvas, this.dots), this.caption);
  }

  show(rows, dots, caption) {
    this.caption.textContent = caption;
    paintCells(this.canvas, rows.length, rows.length, (row, column) => rows[row][column]);
    const circles = dots.map(([x, y, name]) => svg("circle", { cx: x, cy: 1 - y, r: 0.0125, class: name }));
    this.dots.replaceChildren(...circles);
  }
}

/** The boundary between leaves and flowers, and the loss around the network. */
class LeafPictures {
  constructor() {
    this.boundary = new Field("Where the network sees a leaf and where a flower, by red and green");
    this.landscape = new Field("The loss where two weights are changed");
    this.root = group("fields", this.boundary, this.landscape).root;
  }

  /** weights: two entries of WEIGHT_NAMES. */
  show(network, objects, weights) {
    const field = leafField(network, [0, 1], FIELD).map((row) => row.map((p) => 2 * p - 1));
    const dots = objects.map(({ x, kind }) => [x[0], x[1], `key-${kind}`]);
    const text = "Red to the right, green upwards, the two others in the middle. Blue: a leaf; orange: a flower.";
    this.boundary.show(field, dots, text);
    const losses = leafLandscape(network, objects, weights.map(([, ...at]) => at), 2, LANDSCAPE);
    const all = losses.flat();
    const [least, most] = [Math.min(...all), Math.max(...all)];
    const heights = losses.map((row) => row.map((loss) => (loss - least) / (most - least || 1)));
    const names = `${weights[0][0]} to the right, ${weights[1][0]} upwards`;
    const range = `from ${digits(least)}, grey, to ${digits(most)}, orange`;
    this.landscape.show(heights, [[0.5, 0.5, ""]], `Loss ${range}, up to 2 around the weights of now: ${names}.`);
  }
}
