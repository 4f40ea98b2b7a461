/* The sections of the toy: leaf or flower, and how it is trained. Its arithmetic is in leaf.js. */
// --------------------------------------------------------------------------------------
// Leaf or flower

function leafPanel() {
  const state = { x: [...LEAF], bias: false, relu: false, selected: ["hidden", 0] };
  const network = articleNetwork();
  const lines = svg("svg", { "aria-hidden": "true" });
  const columns = h("div", { class: "columns" });
  const drawing = h("div", { class: "network" }, lines, columns);
  const drawLines = () => lines.replaceChildren(...weightLines(columns, network, state.selected));
  new ResizeObserver(drawLines).observe(drawing);
  const colour = h("span", { class: "swatch", "aria-hidden": "true" });
  const sum = h("p", { class: "sum", "aria-live": "polite" });
  const verdict = h("strong");
  const select = (...neuron) => {
    state.selected = neuron;
    draw();
  };
  const draw = () => {
    const y = leafForward(network, state.x, state);
    keepFocus(columns, () => columns.replaceChildren(...networkColumns(y, state, select)));
    drawLines();
    sum.replaceChildren(...leafSum(network, y, state));
    colour.style.background = `rgb(${state.x.slice(0, 3).join()})`;
    const [leaf, flower] = y.output;
    const winner = leaf > flower ? [KINDS[0], leaf, ">", flower] : [KINDS[1], flower, "≥", leaf];
    verdict.textContent = `Output: ${winner[0]} wins, ${digits2(winner[1])} ${winner[2]} ${digits2(winner[3])}.`;
  };
  const sliders = INPUTS.map((name, i) => {
    const limits = name === "volume" ? { max: 100, step: 0.1 } : { max: 255, step: 1 };
    return slider(name, { min: 0, ...limits, value: state.x[i] }, (value) => ((state.x[i] = value), draw()));
  });
  const preset = (label, x) =>
    button(label, () => {
      state.x = [...x];
      sliders.forEach((control, i) => control.set(x[i]));
      draw();
    });
  const presets = [preset("A leaf", LEAF), preset("A sunflower", FLOWER)];
  const switches = ["bias", "relu"].map((name, i) =>
    toggle(["Bias", "ReLU"][i], false, (on) => ((state[name] = on), draw())),
  );
  draw();
  darkScheme.addEventListener("change", draw);
  const controls = [controlRow(presets, switches, colour), group("controls wide", sliders)];
  return [...controls, drawing, group("drawn", sum, verdict)];
}

function networkColumns({ x, sums, hidden, output }, { selected, relu }, onSelect) {
  const label = (name, value) => [h("span", { class: "note" }, name), h("span", {}, digits2(value))];
  const neuron = (layer, o, value, name) =>
    button(label(name, value), () => onSelect(layer, o), {
      class: "neuron",
      "aria-pressed": selected[0] === layer && selected[1] === o,
      style: tint(value, 50),
    });
  const columns = {
    Input: x.map((value, i) => h("div", { class: "neuron input" }, label(INPUTS[i], value))),
    Hidden: hidden.map((value, o) =>
      neuron("hidden", o, value, relu && sums[o] < 0 ? `${digits2(sums[o])} → 0` : `neuron ${o + 1}`),
    ),
    Output: output.map((value, o) => neuron("output", o, value, KINDS[o])),
  };
  return Object.entries(columns).map(([title, items]) =>
    h("div", { class: "column" }, h("h3", { class: "note" }, title), items),
  );
}

const digits2 = (x) => minus(x.toFixed(Math.abs(x) < 100 ? 2 : 1)).replace(/\.?0+$/, "");
const tint = (x, max) => `--tint: rgb(${colourOf(Math.max(Math.min(x / max, 1), -1) * 0.8).join()})`;

/** The selected neuron's sum, with every number in it; weights have their colours. */
function leafSum(network, y, { selected: [layer, o], bias, relu }) {
  const inputs = layer === "hidden" ? y.x : y.hidden;
  const { weight, bias: b } = network[layer];
  const trained = (w) => h("b", { class: "weight" }, digits2(w));
  const terms = weight[o].map((w, i) => [i ? " + (" : "(", `${digits2(inputs[i])} × `, trained(w), ")"]);
  if (bias) terms.push([" + ", trained(b[o]), " bias"]);
  const sum = (layer === "hidden" ? y.sums : y.output)[o];
  const after = layer === "hidden" && relu ? `; ReLU makes it ${digits2(y.hidden[o])}` : "";
  return [layer === "hidden" ? `Neuron ${o + 1}: ` : `${KINDS[o]}: `, ...terms.flat(), ` = ${digits2(sum)}${after}`];
}

/** The weights as lines: thick for large, dashed for negative, with numbers for the selected neuron. */
function weightLines({ children }, network, selected) {
  const neurons = [...children].map((column) => [...column.querySelectorAll(".neuron")]);
  const middle = (neuron) => neuron.offsetTop + neuron.offsetHeight / 2;
  return ["hidden", "output"].flatMap((layer, l) =>
    network[layer].weight.flatMap((row, o) => {
      const chosen = selected[0] === layer && selected[1] === o;
      return row.flatMap((w, i) => {
        const [from, to] = [neurons[l][i], neurons[l + 1][o]];
        const [x, y] = [from.offsetLeft + from.offsetWidth, middle(from)];
        const [dx, dy] = [to.offsetLeft - x, middle(to) - y];
        const look = { "stroke-width": 0.75 + 4 * Math.abs(w), "stroke-dasharray": w < 0 ? "5 3" : "none" };
        const line = svg("line", { x1: x, y1: y, x2: x + dx, y2: y + dy, opacity: chosen ? 1 : 0.3, ...look });
        return chosen && dx > 60 ? [line, svg("text", { x: x + 0.3 * dx, y: y + 0.3 * dy }, digits2(w))] : line;
      });
    }),
  );
}

const weightNames = (layer, inputs, outputs) =>
  outputs.flatMap((output, o) => inputs.map((input, i) => [`${input} → ${output}`, layer, o, i]));
const NEURONS = ["neuron 1", "neuron 2", "neuron 3"];
const WEIGHT_NAMES = [...weightNames("hidden", INPUTS, NEURONS), ...weightNames("output", NEURONS, KINDS)];
const NUDGE = 0.01;

class LeafTraining {
  constructor() {
    this.objects = leafObjects(80, 1);
    this.held = leafObjects(80, 2);
    this.rate = 0.5;
    this.weight = 0;
    this.chart = new Chart("loss of the leaf network after each step");
    this.status = h("p", { class: "status", role: "status" });
    this.nudge = h("p", {});
    this.pictures = new LeafPictures();
    this.go = button("Run", () => this.toggle());
    const limits = { min: -2, max: 3, step: 0.1, value: Math.log10(0.5), format: (x) => (10 ** x).toPrecision(2) };
    const rates = slider("Learning rate", limits, (x) => (this.rate = 10 ** x));
    const weights = picker("Weight", WEIGHT_NAMES.map(([name]) => name), 0, (i) => ((this.weight = i), this.update()));
    const buttons = [button("Step", () => this.step()), this.go, button("Start over", () => this.reset()), rates];
    const pictures = [this.chart, controlRow(weights), this.pictures, this.nudge];
    this.root = group("drawn", controlRow(buttons), this.status, pictures).root;
    darkScheme.addEventListener("change", () => this.update());
    this.reset();
  }

  reset() {
    this.stop();
    this.network = randomNetwork(LEAF_SEED);
    this.losses = [leafLoss(this.network, this.objects).loss];
    this.failed = false;
    this.update();
  }

  toggle() {
    if (this.running) return this.stop();
    this.go.textContent = "Stop";
    this.running = setInterval(() => {
      this.step();
      if (this.losses.length > 300) this.stop();
    }, 30);
  }

  stop() {
    clearInterval(this.running);
    this.running = null;
    this.go.textContent = "Run";
  }

  step() {
    if (this.failed) return;
    const next = leafStep(this.network, this.objects, this.rate);
    const { loss } = leafLoss(next, this.objects);
    if (!Number.isFinite(loss) || loss > 20 * this.losses[0]) {
      this.failed = true;
      this.stop();
    } else {
      this.network = next;
      this.losses.push(loss);
    }
    this.update();
  }

  update() {
    const { loss } = leafLoss(this.network, this.objects);
    const { accuracy } = leafLoss(this.network, this.held);
    this.root.dataset.accuracy = accuracy;
    const steps = this.losses.length - 1;
    this.status.textContent = this.failed
      ? `Exploded after step ${steps}: with a rate of ${this.rate.toPrecision(2)} each step jumps over the ` +
        `valley and lands higher. Start over with a smaller rate.`
      : `Step ${steps}: loss ${loss.toFixed(4)}, ${Math.round(100 * accuracy)} % of 80 other objects right.`;
    const line = { name: "training loss", points: this.losses.map((y, x) => [x, y]), colour: 0 };
    this.chart.show([line], { name: "guessing: −ln ½", y: Math.LN2 });
    const another = WEIGHT_NAMES[(this.weight + 1) % WEIGHT_NAMES.length];
    this.pictures.show(this.network, this.objects, [WEIGHT_NAMES[this.weight], another]);
    const [name, layer, o, i] = WEIGHT_NAMES[this.weight];
    const moved = structuredClone(this.network);
    moved[layer].weight[o][i] += NUDGE;
    const difference = (leafLoss(moved, this.objects).loss - loss) / NUDGE;
    const derivative = leafGradient(this.network, this.objects)[layer].weight[o][i];
    this.nudge.textContent =
      `${name} is ${digits(this.network[layer].weight[o][i])}. Raised by ${NUDGE}, it ` +
      `changes the loss by ${minus((difference * NUDGE).toPrecision(2))}: ${digits(difference)} for each unit. By ` +
      `the chain rule its derivative is ${digits(derivative)}. A step of gradient descent moves it by ` +
      `${minus((-this.rate * derivative).toPrecision(2))}: minus the learning rate times this derivative.`;
  }
}

const RUN_LOSS =
  "Your model learned in the same way. Its right answers are the tokens, characters or parts of words, that come " +
  "next in a text. Its loss is in nats, as ln is the natural logarithm; the validation loss is of text that is new " +
  "to it.";

/** The losses of metrics.jsonl, if the run has them. */
function runLoss(app) {
  const none = "The run's folder had no metrics.jsonl, so there is no curve to draw.";
  if (!app.data.metrics.length) return h("p", { class: "quiet" }, none);
  const chart = new Chart("training and validation loss of this run");
  const V = app.model.tokenizer_vocab_size;
  const level = { name: `guessing: −ln 1/${V} = ${Math.log(V).toFixed(2)}`, y: Math.log(V) };
  const update = () => {
    const { metrics } = app.data;
    const points = (kind, key) => metrics.filter((row) => row.kind === kind).map((row) => [row.iter, row[key]]);
    const lines = [
      { name: "training loss", points: points("train", "train_loss"), colour: 0 },
      { name: "validation loss", points: points("eval", "val_loss"), colour: 1 },
    ];
    chart.show(lines.filter(({ points }) => points.length), level);
  };
  return [h("p", {}, RUN_LOSS), { root: chart.root, update }];
}

// --------------------------------------------------------------------------------------
// Pictures of the training

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
