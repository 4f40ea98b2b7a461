/* The article's first network: four numbers of an object in, three neurons, two outputs; leaf if the first is larger.

A network is {hidden: {weight, bias}, output: {weight, bias}}, each weight a list of rows, one for each neuron. Its loss
is that of engine.js. */

const LEAF = [32, 107, 56, 11.2]; // red, green, blue, millilitres
const FLOWER = [241, 200, 4, 59.5];
const INPUTS = ["red", "green", "blue", "volume"];
const KINDS = ["leaf", "flower"];
const LEAF_SEED = 12; // seed of the random weights that training starts with
const INPUT_SCALE = 255; // in training, inputs are divided by it, so that one learning rate fits all weights

/** The article's weights. Weights that its text lacks are chosen so that its sums come out. */
function articleNetwork() {
  return {
    hidden: {
      weight: [
        [0.1, -0.29, -0.07, 0.46],
        [0.12, -0.05, 0.11, -0.13],
        [-0.36, -0.21, -0.12, -0.57],
      ],
      bias: [0.25, 0, 0],
    },
    output: {
      weight: [
        [-0.17, 0.39, 0.1],
        [0.14, -0.2, 0.03],
      ],
      bias: [0, 0],
    },
  };
}

function leafLayer(x, { weight, bias }, withBias) {
  return weight.map((row, o) => row.reduce((sum, w, i) => sum + w * x[i], withBias ? bias[o] : 0));
}

/** All numbers of a forward pass: the sums of the hidden neurons, their activations, and the outputs. */
function leafForward(network, x, { bias = true, relu = true } = {}) {
  const sums = leafLayer(x, network.hidden, bias);
  const hidden = relu ? sums.map((sum) => Math.max(sum, 0)) : sums;
  return { x, sums, hidden, output: leafLayer(hidden, network.output, bias) };
}

/** A generator of numbers in [0, 1), the same ones for the same seed (mulberry32). */
function randomNumbers(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

function normal(random) {
  return Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
}

/** n objects, half of them leaves, around the article's two: x, divided by INPUT_SCALE, and kind, 0 or 1. */
function leafObjects(n, seed) {
  const random = randomNumbers(seed);
  const spread = [40, 40, 25, 12];
  return Array.from({ length: n }, (_, number) => {
    const kind = number % 2;
    const x = [LEAF, FLOWER][kind].map((mean, i) => Math.max(mean + spread[i] * normal(random), 0) / INPUT_SCALE);
    return { x, kind };
  });
}

function randomNetwork(seed) {
  const random = randomNumbers(seed);
  const layer = (outputs, inputs) => ({
    weight: Array.from({ length: outputs }, () =>
      Array.from({ length: inputs }, () => normal(random) / Math.sqrt(inputs)),
    ),
    bias: Array(outputs).fill(0),
  });
  return { hidden: layer(3, 4), output: layer(2, 3) };
}

/** The mean loss over the objects, and the fraction that is classified correctly. */
function leafLoss(network, objects) {
  const outputs = objects.map(({ x }) => leafForward(network, x).output);
  const loss = meanOf(outputs.map((output, i) => lossOf(output, objects[i].kind)));
  const right = outputs.filter((output, i) => (output[1] > output[0] ? 1 : 0) === objects[i].kind).length;
  return { loss, accuracy: right / objects.length };
}

/** The derivative of the mean loss by each weight and bias, by the chain rule: a network of the same form. */
function leafGradient(network, objects) {
  const zeros = ({ weight, bias }) => ({ weight: weight.map((row) => row.map(() => 0)), bias: bias.map(() => 0) });
  const gradient = { hidden: zeros(network.hidden), output: zeros(network.output) };
  for (const { x, kind } of objects) {
    const { sums, hidden, output } = leafForward(network, x);
    const byOutput = output.map((_, o) => (Math.exp(-lossOf(output, o)) - (o === kind ? 1 : 0)) / objects.length);
    const byHidden = hidden.map((_, h) => byOutput.reduce((sum, g, o) => sum + g * network.output.weight[o][h], 0));
    const bySums = byHidden.map((g, h) => (sums[h] > 0 ? g : 0));
    accumulate(gradient.output, byOutput, hidden);
    accumulate(gradient.hidden, bySums, x);
  }
  return gradient;
}

function accumulate(layer, byOutput, inputs) {
  byOutput.forEach((g, o) => {
    layer.bias[o] += g;
    inputs.forEach((value, i) => (layer.weight[o][i] += g * value));
  });
}

/** The network after one step of gradient descent. */
function leafStep(network, objects, rate) {
  const gradient = leafGradient(network, objects);
  const moved = (name) => ({
    weight: network[name].weight.map((row, o) => row.map((w, i) => w - rate * gradient[name].weight[o][i])),
    bias: network[name].bias.map((b, o) => b - rate * gradient[name].bias[o]),
  });
  return { hidden: moved("hidden"), output: moved("output") };
}

// --------------------------------------------------------------------------------------
// Pictures: n rows of n numbers, the top one first

/** f of n times n pairs of numbers from 0 to 1. The first number grows to the right, the second upwards. */
function leafGrid(n, f) {
  const row = (y) => Array.from({ length: n }, (_, x) => f((x + 0.5) / n, y));
  return Array.from({ length: n }, (_, fromTop) => row((n - fromTop - 0.5) / n));
}

/** The probability of a flower by two inputs, which are indices of INPUTS. The decision boundary is at 0.5.

The other two inputs are halfway between the article's leaf and its flower. */
function leafField(network, [across, up], n) {
  const middle = LEAF.map((value, i) => (value + FLOWER[i]) / 2 / INPUT_SCALE);
  return leafGrid(n, (a, b) => {
    const x = middle.with(across, a).with(up, b);
    return Math.exp(-lossOf(leafForward(network, x).output, 1));
  });
}

/** The mean loss when two weights, each [layer, o, i], are changed by up to `span` in both directions. */
function leafLandscape(network, objects, weights, span, n) {
  return leafGrid(n, (...at) => {
    const moved = structuredClone(network);
    weights.forEach(([layer, o, i], k) => (moved[layer].weight[o][i] += span * (2 * at[k] - 1)));
    return leafLoss(moved, objects).loss;
  });
}
