/* How each number of a trace was computed: the operands of one sum, which lead to the numbers before it.

An address names a number: the path of its rows in the trace, and its indices: "stack.blocks.2.attn.q_proj:5,17" is
feature 17 of token 5; of scores and weights they are head, query and key. explainNumber() returns

  address, value      of the number itself; a number with two names is explained under the first
  title, formula      in words and in signs; why: a reason for the formula, if it needs one
  terms               of a sum: name, value, and parts, which spell it out: texts and operands
  sum                 of all terms
  steps               what is done with the sum: text, value, and operand, if there is one; the last has the number

An operand has a value; a name; an address, if it is a number of the trace; weight: true if it is a trained one.

model.js is needed: headSize(), ACTIVATIONS, GAIN. */

function parseAddress(address) {
  const [path, indices] = address.split(":");
  return { path, at: indices.split(",").map(Number) };
}

function lookUp(root, path) {
  return path.split(".").reduce((value, key) => value?.[key], root);
}

/** Look up the number at an address; undefined if there is none. */
function valueAt(trace, address) {
  const { path, at } = parseAddress(address);
  return at.reduce((value, i) => value?.[i], lookUp(trace, path));
}

function dot(x, y, from = 0) {
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i] * y[from + i];
  return sum;
}

const has = (trace, path) => lookUp(trace, path) !== undefined && lookUp(trace, path) !== null;

/** The path of the stack that a path is in: "stack", "decoder" or "source.encoder". */
function stackOf(path) {
  return path.match(/^(stack|decoder|source\.encoder)/)?.[0];
}

/** The path of the residual stream to which a branch is added, or which it replaces. */
function streamBefore(trace, block, branch) {
  if (branch === "attn") return `${block}.input`;
  if (branch === "mlp" && has(trace, `${block}.after_cross`)) return `${block}.after_cross`;
  return `${block}.after_attn`;
}

const BRANCH_NAMES = { attn: "attention", cross: "cross-attention", mlp: "MLP" };
const BRANCH_OUTPUT = { attn: "attn.o_proj", cross: "cross_attn.o_proj", mlp: "feed_forward.down_proj" };

/** The branches of a block that this model has. */
function branchesOf(trace, block) {
  return Object.keys(BRANCH_OUTPUT).filter((branch) => has(trace, `${block}.${BRANCH_OUTPUT[branch]}`));
}

/** The path of the input of a branch. */
function branchInput({ config }, trace, block, branch) {
  if (config.block === "post_norm") return streamBefore(trace, block, branch);
  return `${block}.${branch}_norm.output`;
}

/** The path from which numbers were copied; null if they are computed at this path. */
function aliasOf(model, trace, path) {
  const [, blocks, i, rest] = path.match(/^(.*\.blocks)\.(\d+)\.(.*)$/) ?? [];
  if (rest) return aliasInBlock(model, trace, blocks, +i, rest);
  const stack = stackOf(path);
  if (path === "output") return lastRows(model, trace);
  if (path === `${stack}.norm.input`) return `${stack}.blocks.${lookUp(trace, stack).blocks.length - 1}.output`;
  if (path === `${stack}.embed_norm.input`) return `${stack}.embed`;
  return aliasOfNorm(trace, path);
}

function lastRows({ config }, trace) {
  if (config.model === "window_mlp") return `layers.${trace.layers.length - 1}.activation`;
  return `${config.model === "transformer" ? "decoder" : "stack"}.norm.output`;
}

/** With norm=none, the output of a norm is its input. */
function aliasOfNorm(trace, path) {
  const norm = path.match(/^(.*norm)\.output$/)?.[1];
  if (!norm) return null;
  const { mean, rms } = lookUp(trace, norm);
  return mean || rms ? null : `${norm}.input`;
}

function aliasInBlock(model, trace, blocks, i, rest) {
  const { config } = model;
  const block = `${blocks}.${i}`;
  if (rest === "input") return i ? `${blocks}.${i - 1}.output` : blocks.replace(/blocks$/, "embed_norm.output");
  if (rest === "output") return `${block}.after_${branchesOf(trace, block).at(-1)}`;
  const [, branch] = rest.match(/^after_(\w+)$/) ?? [];
  if (branch && config.block === "plain") return `${block}.${BRANCH_OUTPUT[branch]}`;
  if (branch && config.block === "post_norm") return `${block}.${branch}_norm.output`;
  const [, normed] = rest.match(/^(attn|cross|mlp)_norm\.input$/) ?? [];
  if (normed && config.block !== "post_norm") return streamBefore(trace, block, normed);
  if (rest === "feed_forward.input") return branchInput(model, trace, block, "mlp");
  if (rest === "feed_forward.hidden" && config.mlp === "plain") return `${block}.feed_forward.activation`;
  const [, attention, name] = rest.match(/^(attn|cross_attn|cross_attn\.context)\.([qkv])$/) ?? [];
  if (name && !(attention === "attn" && config.position === "rotary" && name !== "v")) {
    return `${block}.${attention}.${config.qk_norm && name !== "v" ? `${name}_norm` : `${name}_proj`}`;
  }
  return aliasOfNorm(trace, `${block}.${rest}`);
}

/** Follow copies back to the path where the numbers were computed. */
function resolvePath(model, trace, path) {
  for (let next; (next = aliasOf(model, trace, path));) path = next;
  return path;
}

function resolveAddress(model, trace, address) {
  const { path, at } = parseAddress(address);
  return `${resolvePath(model, trace, path)}:${at.join(",")}`;
}

// --------------------------------------------------------------------------------------
// Rules: how the numbers under each name are computed

function operand({ trace }, path, at, name) {
  const address = `${path}:${at.join(",")}`;
  return { value: valueAt(trace, address), address, name: name ?? null };
}

function trained(value, name) {
  return { value, name, weight: true };
}

/** A product. */
function term(name, ...factors) {
  const parts = factors.flatMap((factor, i) => (i ? [" × ", factor] : [factor]));
  return { name, parts, value: factors.reduce((product, factor) => product * factor.value, 1) };
}

/** The operands of a number's terms and steps. */
function operandsOf({ terms, steps }) {
  const all = [...terms.flatMap(({ parts }) => parts), ...steps.map((step) => step.operand)];
  return all.filter((part) => part?.value !== undefined);
}

/** The sum of a row of weights times the inputs, and a bias term. */
function linearRule(c, input, layer) {
  const [t, o] = c.at;
  const { data, shape } = layer.weight;
  const row = lookUp(c.trace, input)[t];
  const terms = Array.from(row, (_, i) =>
    term(`x[${i}]`, operand(c, input, [t, i], `x[${i}]`), trained(data[o * shape[1] + i], `w[${o}, ${i}]`)),
  );
  if (layer.bias) terms.push(term("bias", trained(layer.bias.data[o], `b[${o}]`)));
  return { formula: layer.bias ? "Σ x · w + b" : "Σ x · w", terms };
}

/** The path of the weights of a part whose path in the trace this is. */
const weightsPath = (path) => path.replace("source.", "").replace("feed_forward", "mlp").replace(".context", "");

function projectionRule(c) {
  return linearRule(c, linearInput(c, c.path), lookUp(c.model.weights, weightsPath(c.path)));
}

function layerRule(c, i) {
  return linearRule(c, +i ? `layers.${i - 1}.activation` : "window", c.model.weights.layers[i]);
}

function normRule(c, norm) {
  const [t, i] = c.at;
  const layer = lookUp(c.model.weights, weightsPath(norm));
  const { mean } = lookUp(c.trace, norm);
  const terms = [term("x", operand(c, `${norm}.input`, [t, i]))];
  if (mean) {
    const center = operand(c, `${norm}.mean`, [t]);
    terms.push({ name: "mean", parts: ["− ", center], value: -center.value });
  }
  const scale = operand(c, `${norm}.${mean ? "std" : "rms"}`, [t]);
  const gain = trained(layer.weight.data[i], `gain[${i}]`);
  let value = addUp(terms) / scale.value;
  const name = mean ? "deviation" : "root mean square";
  const steps = [{ text: `/ ${name}`, operand: scale, value }];
  steps.push({ text: "× gain", operand: gain, value: (value *= gain.value) });
  if (layer.bias) {
    const bias = trained(layer.bias.data[i], `bias[${i}]`);
    steps.push({ text: "+ bias", operand: bias, value: value + bias.value });
  }
  const formula = `${mean ? "(x − mean)" : "x"} / ${name} × gain`;
  return { formula: layer.bias ? `${formula} + bias` : formula, terms, steps };
}

const perFeature = (n) => `/ ${n}, the number of features`;

function meanRule(c, norm) {
  const terms = Array.from(lookUp(c.trace, `${norm}.input`)[c.at[0]], (_, i) =>
    term(`x[${i}]`, operand(c, `${norm}.input`, [c.at[0], i])),
  );
  const step = { text: perFeature(terms.length), value: addUp(terms) / terms.length };
  return { formula: "Σ x / number of features", terms, steps: [step] };
}

/** The root of a mean of squares, and of a small number that keeps a norm from dividing by 0. */
function rootOfMean(terms, eps) {
  const mean = addUp(terms) / terms.length;
  return [
    { text: perFeature(terms.length), value: mean },
    { text: `√(this + ${digits(eps)}, so that it is never 0)`, value: Math.sqrt(mean + eps) },
  ];
}

function deviationRule(c, norm) {
  const mean = operand(c, `${norm}.mean`, c.at);
  const terms = Array.from(lookUp(c.trace, `${norm}.input`)[c.at[0]], (_, i) => {
    const x = operand(c, `${norm}.input`, [c.at[0], i]);
    return { name: `x[${i}]`, parts: ["(", x, " − ", mean, ")²"], value: (x.value - mean.value) ** 2 };
  });
  const steps = rootOfMean(terms, c.model.config.norm_eps);
  return { formula: "√(Σ (x − mean)² / number of features)", terms, steps };
}

/** The root mean square of n numbers of row t, beginning with number `from`. */
function rootMeanSquareRule(c, path, { t, from, n, eps }) {
  const terms = Array.from({ length: n }, (_, i) => {
    const x = operand(c, path, [t, from + i]);
    return { name: `x[${i}]`, parts: [x, "²"], value: x.value ** 2 };
  });
  return { formula: "√(Σ x² / number of features)", terms, steps: rootOfMean(terms, eps) };
}

function normRootRule(c, norm) {
  const { n_embd: n, norm_eps: eps } = c.model.config;
  return rootMeanSquareRule(c, `${norm}.input`, { t: c.at[0], from: 0, n, eps });
}

/** Two numbers of the residual stream: what was there, and what a branch adds. */
function residualRule(c, block, branch) {
  const stream = streamBefore(c.trace, block, branch);
  return {
    formula: "residual stream + branch",
    terms: [
      term("before", operand(c, stream, c.at)),
      term(BRANCH_NAMES[branch], operand(c, `${block}.${BRANCH_OUTPUT[branch]}`, c.at)),
    ],
  };
}

function rotaryRule(c, attention, name) {
  const [t, j] = c.at;
  const D = headSize(c.model.config);
  const { cos, sin, frequency } = lookUp(c.trace, stackOf(c.path)).position;
  const from = `${attention}.${c.model.config.qk_norm ? `${name}_norm` : `${name}_proj`}`;
  const other = j - (j % D) + ((j + D / 2) % D);
  const angle = digits(t * frequency[j % (D / 2)]);
  return {
    formula: `a cos − b sin, or b cos + a sin: a pair of features, rotated by ${angle} radians`,
    terms: [
      term("cos", operand(c, from, [t, j]), { value: cos[t][j % D], name: "cos" }),
      term(j % D < D / 2 ? "− sin" : "sin", operand(c, from, [t, other]), { value: sin[t][j % D], name: "sin" }),
    ],
  };
}

function headNormRule(c, name) {
  const [t, j] = c.at;
  const D = headSize(c.model.config);
  const x = operand(c, `${name}_proj`, c.at);
  const rms = operand(c, `${name}_rms`, [t, Math.floor(j / D)]);
  const step = { text: "/ root mean square", operand: rms, value: x.value / rms.value };
  return { formula: "x / root mean square of its head", terms: [term("x", x)], steps: [step] };
}

function headRootRule(c, name) {
  const [t, h] = c.at;
  const n = headSize(c.model.config);
  return rootMeanSquareRule(c, `${name}_proj`, { t, from: h * n, n, eps: FLOAT32_EPS });
}

/** The head of keys and values that head h reads, and the index in a row at which it begins. */
function keyStart(config, h) {
  const group = config.n_head / (config.n_kv_head || config.n_head);
  return Math.floor(h / group) * headSize(config);
}

const keysOf = (attention) => (attention.endsWith("cross_attn") ? `${attention}.context` : attention);

const WHY_ROOT =
  "Why / √D: q·k is a sum of D products, one for each feature of the head, and about √D times as large as one of " +
  "them. If scores are large, softmax gives nearly all to a single key, and little is learned.";

function scoreRule(c, attention) {
  const [h, t, s] = c.at;
  const D = headSize(c.model.config);
  const from = keyStart(c.model.config, h);
  const terms = Array.from({ length: D }, (_, i) => {
    const q = operand(c, `${attention}.q`, [t, h * D + i], `q[${i}]`);
    return term(`feature ${i}`, q, operand(c, `${keysOf(attention)}.k`, [s, from + i], `k[${i}]`));
  });
  const sum = addUp(terms);
  const step = { text: `/ √${D}`, value: sum / Math.sqrt(D) };
  return { formula: "Σ q · k / √D", terms, steps: [step], why: WHY_ROOT };
}

/** Softmax of one number of a row: its exp divided by the sum of all exp. */
function softmaxRule(numbers, own, factor, names) {
  const largest = Math.max(...numbers);
  const terms = numbers.map((x, i) => ({
    name: names(i),
    parts: [factor(i), ` → exp(${digits(x - largest)})`],
    value: Math.exp(x - largest),
  }));
  const exp = terms[own].value;
  const step = { text: `exp(${digits(numbers[own] - largest)}) = ${digits(exp)} / the sum`, value: exp / addUp(terms) };
  return { formula: "exp(x − largest) / Σ exp(x − largest)", terms, steps: [step] };
}

function weightRule(c, attention) {
  const [h, t, s] = c.at;
  const scores = lookUp(c.trace, attention).scores[h][t];
  const { mask } = lookUp(c.trace, stackOf(c.path));
  const bias = attention.endsWith("cross_attn") ? null : mask[h % mask.length][t];
  const sums = Array.from(scores, (score, k) => score + (bias ? bias[k] : 0));
  const factor = (k) => operand(c, `${attention}.scores`, [h, t, k], bias?.[k] ? `+ mask ${digits(bias[k])}` : null);
  return softmaxRule(sums, s, factor, (k) => `key ${k}`);
}

function headsRule(c, attention) {
  const [t, j] = c.at;
  const D = headSize(c.model.config);
  const h = Math.floor(j / D);
  const feature = keyStart(c.model.config, h) + (j % D);
  const weights = lookUp(c.trace, attention).weights[h][t];
  const terms = Array.from(weights, (_, s) => {
    const weight = operand(c, `${attention}.weights`, [h, t, s], "weight");
    return term(`key ${s}`, weight, operand(c, `${keysOf(attention)}.v`, [s, feature], "v"));
  });
  return { formula: "Σ attention weight × value, over the keys", terms };
}

function activationRule(c, layer) {
  const { model, mlp, activation: name } = c.model.config;
  const from = model === "window_mlp" ? "linear" : mlp === "gated" ? "gate_proj" : "up_proj";
  const x = operand(c, `${layer}.${from}`, c.at);
  const step = { text: name, value: ACTIVATIONS[name][0](x.value) };
  return { formula: `${name}(x)`, terms: [term("x", x)], steps: [step] };
}

function gateRule(c, mlp) {
  const [gate, up] = ["activation", "up_proj"].map((name) => operand(c, `${mlp}.${name}`, c.at, name));
  return { formula: "gate × value", terms: [term("product", gate, up)] };
}

function convRule(c, block) {
  const [t, i] = c.at;
  const { data, shape } = lookUp(c.model.weights, weightsPath(block)).conv.weight;
  const input = `${block}.feed_forward.input`;
  const terms = [term("itself", operand(c, input, [t, i]))];
  for (let back = 1; back <= Math.min(shape[0], t); back++) {
    const weight = trained(GAIN * data[(back - 1) * shape[1] + i], `${GAIN} w[${back}, ${i}]`);
    terms.push(term(`${back} before`, operand(c, input, [t - back, i]), weight));
  }
  return { formula: "x of this token + weighted x of the tokens before", terms };
}

function embedRule(c, stack) {
  const { position } = lookUp(c.trace, stack);
  const before = stack === "source.encoder" ? "source." : "";
  const scale = position.scale ?? 1;
  const scaled = (path) => [operand(c, path, c.at), ...(scale === 1 ? [] : [{ value: scale, name: "√C" }])];
  const terms = [term("token", ...scaled(`${before}wte`))];
  if (position.vectors) terms.push(term("position", operand(c, `${stack}.position.vectors`, c.at)));
  return { formula: terms.map(({ name }) => name).join(" + "), terms };
}

function tokenRule(c) {
  const [t, i] = c.at;
  const id = lookUp(c.trace, c.path.replace(/wte$/, "idx"))[t];
  const value = valueAt(c.trace, `${c.path}:${t},${i}`);
  if (c.model.config.embedding === "number") {
    const text = `(${id} + 1) / ${c.model.config.vocab_size}`;
    return { formula: "(id + 1) / V", terms: [term(`token ${id}`, { value, name: text })] };
  }
  const terms = [term(`token ${id}`, trained(value, `wte[${id}, ${i}]`))];
  return { formula: "a weight, learned in training: a row of the embedding table", terms };
}

function positionRule(c) {
  const [t, i] = c.at;
  const value = valueAt(c.trace, c.address);
  if (c.model.config.position === "learned") {
    const terms = [term(`position ${t}`, trained(value, `wpe[${t}, ${i}]`))];
    return { formula: "a weight, learned in training: a row of the position table", terms };
  }
  const text = `${i % 2 ? "cos" : "sin"}(${t} / 10000^(${i - (i % 2)}/${c.model.config.n_embd}))`;
  return { formula: "a sinusoid", terms: [term(text, { value, name: text })] };
}

function windowRule(c) {
  const [t, j] = c.at;
  const { window, n_embd } = c.model.config;
  const token = t - window + 1 + Math.floor(j / n_embd);
  if (token < 0) return { formula: "no token: 0", terms: [] };
  const feature = operand(c, "wte", [token, j % n_embd]);
  return { formula: "a feature of a token", terms: [term(`token ${token}`, feature)] };
}

function logitRule(c) {
  const y = linearRule(c, "output", c.model.weights.lm_head);
  const cap = c.model.config.logit_soft_cap;
  if (cap) y.steps = [{ text: `${cap} tanh(x / ${cap})`, value: cap * Math.tanh(addUp(y.terms) / cap) }];
  return y;
}

function probabilityRule(c) {
  const [t, v] = c.at;
  const logits = Array.from(c.trace.logits[t].subarray(0, c.model.tokenizer_vocab_size));
  const factor = (i) => operand(c, "logits", [t, i]);
  return softmaxRule(logits, v, factor, (i) => `token ${i}`);
}

/** The derivative of the loss by a weight: over the tokens, the derivative by what is computed with the weight, times
what the weight is multiplied by. */
function gradientRule(c, layer, kind) {
  const [o, i] = c.at;
  const { config, weights } = c.model;
  const tied = layer === "wte" && weights.lm_head.weight === weights.wte.weight;
  const terms = [];
  const add = (output, t, feature, ...factors) => {
    const path = `gradient.trace.${output}`;
    const derivative = { value: lookUp(c.trace, path)[t][feature], name: `derivative of the loss by ${output}` };
    terms.push(term(`token ${t}`, derivative, ...factors));
  };
  const ofLinear = (t, linear) => {
    const capped = linear === "lm_head" && config.logit_soft_cap;
    const output = linear === "lm_head" ? "logits" : linear.replace(".mlp.", ".feed_forward.");
    const feature = kind === "bias" ? i : o;
    const slope = { value: capped && 1 - (c.trace.logits[t][feature] / capped) ** 2, name: "slope of the soft cap" };
    const input = kind === "bias" ? [] : [operand(c, linearInput(c, linear), [t, i])];
    add(output, t, feature, ...(capped ? [slope] : []), ...input);
  };
  c.trace.idx.forEach((id, t) => {
    const back = t - 1 - o;
    const block = layer.replace(/\.conv$/, ".feed_forward");
    if (layer === "wte" && id === o) add("wte", t, i);
    if (layer.endsWith("wpe") && t === o) add(layer.replace("wpe", "vectors"), t, i);
    if (layer.endsWith("norm"))
      add(`${layer}.output`, t, i, ...(kind === "bias" ? [] : [normedOperand(c, layer, t, i)]));
    if (block !== layer && back >= 0)
      add(`${block}.conv`, t, i, trained(GAIN, "gain"), operand(c, `${block}.input`, [back, i]));
    if (linearInput(c, layer)) ofLinear(t, layer);
    if (tied) ofLinear(t, "lm_head");
  });
  return { formula: "Σ derivative of the loss by the output × input, over the tokens", terms };
}

/** A number of a norm's input, less the mean and divided by the scale. */
function normedOperand(c, norm, t, i) {
  const { input, mean, std, rms } = lookUp(c.trace, norm);
  return { value: (input[t][i] - (mean ? mean[t] : 0)) / (std ?? rms)[t], name: "x, normalised" };
}

/** Patterns of paths, and the rule by which their numbers are computed: f(c, what the pattern's groups match). */
const PATH_RULES = [
  [/^gradient\.weights\.(.+)\.(\w+)$/, gradientRule],
  [/^(?:source\.)?wte$/, tokenRule],
  [/^window$/, windowRule],
  [/^layers\.(\d+)\.linear$/, layerRule],
  [/^(.*)\.activation$/, activationRule],
  [/^logits$/, logitRule],
  [/^probs$/, probabilityRule],
  [/^(.*)\.embed$/, embedRule],
  [/\.position\.vectors$/, positionRule],
  [/^(.*norm)\.output$/, normRule],
  [/^(.*norm)\.mean$/, meanRule],
  [/^(.*norm)\.std$/, deviationRule],
  [/^(.*norm)\.rms$/, normRootRule],
  [/^(.*)\.after_(attn|cross|mlp)$/, residualRule],
  [/^(.*)\.(attn|cross|mlp)_norm\.input$/, residualRule],
  [/_proj$/, projectionRule],
  [/^(.*)_norm$/, headNormRule],
  [/^(.*)_rms$/, headRootRule],
  [/^(.*)\.([qk])$/, rotaryRule],
  [/^(.*)\.scores$/, scoreRule],
  [/^(.*)\.weights$/, weightRule],
  [/^(.*)\.heads$/, headsRule],
  [/^(.*)\.feed_forward\.conv$/, convRule],
  [/^(.*)\.hidden$/, gateRule],
];

function applyRule(c) {
  const [pattern, rule] = PATH_RULES.find(([pattern]) => pattern.test(c.path));
  return rule(c, ...c.path.match(pattern).slice(1));
}

/** The path of what a linear layer of a block, or the head, reads; null for any other path. */
function linearInput({ model, trace }, path) {
  if (path === "lm_head") return "output";
  const [, block, part, name] = path.match(/^(.*\.blocks\.\d+)\.(.+)\.(\w+_proj)$/) ?? [];
  if (!block) return null;
  if (name === "o_proj") return `${block}.${part}.heads`;
  if (name === "down_proj") return `${block}.feed_forward.hidden`;
  if (!part.includes("attn"))
    return `${block}.feed_forward.${has(trace, `${block}.feed_forward.conv`) ? "conv" : "input"}`;
  if (part.endsWith("context")) return "source.encoder.norm.output";
  return branchInput(model, trace, block, part === "attn" ? "attn" : "cross");
}

function addUp(terms) {
  return terms.reduce((sum, { value }) => sum + value, 0);
}

/** A number as text, with the typographical minus sign. */
const minus = (text) => String(text).replaceAll("-", "−");

function digits(x) {
  if (x === undefined || x === null) return "";
  if (x === -Infinity) return "−∞";
  const text = x !== 0 && Math.abs(x) < 5e-5 ? x.toExponential(1) : Math.abs(x) >= 1000 ? x.toFixed(1) : x.toFixed(4);
  return minus(text);
}

/** Explain the number at an address, as described above. Throws an Error if the trace has no such address. */
function explainNumber(model, trace, wanted) {
  const given = valueAt(trace, wanted);
  if (typeof given !== "number") throw new Error(`there is no number at ${wanted}`);
  const address = resolveAddress(model, trace, wanted);
  const { path, at } = parseAddress(address);
  const y = applyRule({ model, trace, address, path, at });
  return { steps: [], ...y, address, value: given, title: titleOf(path, at, model.config), sum: addUp(y.terms) };
}

const NAMES = {
  wte: "token embedding",
  embed: "embedding with position",
  vectors: "position",
  q_proj: "query",
  k_proj: "key",
  v_proj: "value",
  q: "query",
  k: "key",
  v: "value",
  q_norm: "query, normalised",
  k_norm: "key, normalised",
  q_rms: "root mean square of a query",
  k_rms: "root mean square of a key",
  mean: "norm's mean",
  std: "norm's standard deviation",
  rms: "norm's root mean square",
  scores: "score",
  weights: "attention weight",
  heads: "output of a head",
  o_proj: "attention's output",
  after_attn: "residual stream after attention",
  after_cross: "stream after cross-attention",
  after_mlp: "residual stream after the MLP",
  up_proj: "MLP: neuron before activation",
  gate_proj: "MLP: gate",
  activation: "neuron",
  hidden: "MLP: gated neuron",
  down_proj: "MLP's output",
  conv: "convolution",
  logits: "logit",
  probs: "probability",
  linear: "neuron before activation",
  window: "input",
};

const NAMES_BY_POSITION = {
  none: { embed: "embedding" },
  rotary: { embed: "embedding", q: "query, rotated", k: "key, rotated" },
  alibi: { embed: "embedding" },
};

/** Describe an address: "MLP's output, layer 2, position 5, feature 17". Layers count from 1, as in the panels. */
function titleOf(path, at, config) {
  if (path.startsWith("gradient.")) return `derivative of the loss by ${path.replace("gradient.weights.", "")}[${at}]`;
  const name = path.split(".").at(-1);
  const layer = path.match(/(?:blocks|layers)\.(\d+)/);
  const named = { ...NAMES, ...NAMES_BY_POSITION[config.position] };
  const known = path.endsWith("norm.output") ? "norm's output" : (named[name] ?? name);
  const what = path.includes("cross_attn") ? `cross-attention: ${known.replace("attention", "its")}` : known;
  const where = layer ? `, layer ${+layer[1] + 1}` : "";
  const side = path.startsWith("source") ? ", encoder" : "";
  if (at.length === 3) return `${what}${side}${where}, head ${at[0] + 1}, position ${at[1]} to ${at[2]}`;
  if (at.length === 1) return `${what}${side}${where}, position ${at[0]}`;
  if (name.endsWith("_rms")) return `${what}${side}${where}, position ${at[0]}, head ${at[1] + 1}`;
  const unit =
    { logits: "id", probs: "id" }[name] ??
    (/up_proj|gate_proj|activation|hidden|linear/.test(name) ? "neuron" : "feature");
  return `${what}${side}${where}, position ${at[0]}, ${unit} ${at[1]}`;
}

// --------------------------------------------------------------------------------------
// The contribution of each part to a logit

/** Scale a part of a norm's input by the mean and deviation of the whole input, without the bias term. */
function throughNorm(row, norm, layer, t) {
  if (!norm.mean && !norm.rms) return row;
  const mean = norm.mean ? row.reduce((sum, x) => sum + x, 0) / row.length : 0;
  const scale = norm.mean ? norm.std[t] : norm.rms[t];
  return Float64Array.from(row, (x, i) => ((x - mean) / scale) * layer.weight.data[i]);
}

/** Pass all parts through a norm; its bias term becomes one more part. */
function freeze(parts, norm, layer, t) {
  for (const part of parts) part.row = throughNorm(part.row, norm, layer, t);
  if (norm.mean && layer.bias) parts.push({ name: "bias of norms", row: Float64Array.from(layer.bias.data) });
}

/** Split the stack's output of token t into rows that add up to it: name, path and row. All norms are held fixed. */
function decompose(model, trace, stack, t) {
  const y = lookUp(trace, stack);
  const weights = lookUp(model.weights, stack);
  const scaled = (row) => Float64Array.from(row, (x) => x * (y.position.scale ?? 1));
  let parts = [{ name: "embedding", path: "wte", row: scaled(trace.wte[t]) }];
  if (y.position.vectors)
    parts.push({ name: "position", path: `${stack}.position.vectors`, row: y.position.vectors[t] });
  freeze(parts, y.embed_norm, weights.embed_norm, t);
  y.blocks.forEach((block, i) => {
    for (const branch of branchesOf(trace, `${stack}.blocks.${i}`)) {
      const path = `${stack}.blocks.${i}.${BRANCH_OUTPUT[branch]}`;
      const part = { name: BRANCH_NAMES[branch], layer: i, branch, path, row: lookUp(trace, path)[t] };
      parts = model.config.block === "plain" ? [part] : [...parts, part];
      if (model.config.block !== "post_norm") continue;
      freeze(parts, block[`${branch}_norm`], weights.blocks[i][`${branch}_norm`], t);
    }
  });
  freeze(parts, y.norm, weights.norm, t);
  return parts;
}

/** The mean of the head's weights and biases over all tokens. All logits share it, and softmax ignores it. */
function meanOfHead({ weights, tokenizer_vocab_size: V }) {
  const { weight, bias } = weights.lm_head;
  const C = weight.shape[1];
  const row = new Float64Array(C);
  for (let i = 0; i < V * C; i++) row[i % C] += weight.data[i] / V;
  return { row, bias: bias ? bias.data.subarray(0, V).reduce((sum, x) => sum + x / V, 0) : 0 };
}

/** The contribution of each part of decompose(), and of the bias, to the logit of token v less the mean of all logits:
name, path and value. */
function contributions(model, trace, stack, t, v) {
  const { weight, bias } = model.weights.lm_head;
  const mean = (model.meanOfHead ??= meanOfHead(model));
  const merged = new Map();
  for (const { row, ...part } of decompose(model, trace, stack, t)) {
    const key = part.path ?? part.name;
    const value = dot(row, weight.data, v * weight.shape[1]) - dot(row, mean.row);
    merged.set(key, { ...part, value: (merged.get(key)?.value ?? 0) + value });
  }
  if (bias) merged.set("head", { name: "bias of the head", value: bias.data[v] - mean.bias });
  return [...merged.values()];
}

/** What the head makes of a row: its logits. */
function logitsOf({ config, weights }, row) {
  const { weight, bias } = weights.lm_head;
  const cap = config.logit_soft_cap;
  return Float32Array.from({ length: weight.shape[0] }, (_, v) => {
    const logit = dot(row, weight.data, v * weight.shape[1]) + (bias ? bias.data[v] : 0);
    return cap ? cap * Math.tanh(logit / cap) : logit;
  });
}

/** The final norm of a row. */
function normalized(row, layer, { norm, block, norm_eps }) {
  if (norm === "none" || block === "post_norm") return row;
  const mean = norm === "layernorm" ? row.reduce((sum, x) => sum + x, 0) / row.length : 0;
  const scale = Math.sqrt(row.reduce((sum, x) => sum + (x - mean) ** 2, 0) / row.length + norm_eps);
  const bias = layer.bias?.data;
  return row.map((x, i) => ((x - mean) / scale) * layer.weight.data[i] + (bias ? bias[i] : 0));
}

/** The logits that the head would give after each branch: label, path and logits. The embedding comes first. */
function logitLens(model, trace, stack, t) {
  const y = lookUp(trace, stack);
  const { norm } = lookUp(model.weights, stack);
  const read = (label, path) => {
    const row = normalized(lookUp(trace, path)[t], norm, model.config);
    return { label, path, logits: logitsOf(model, row) };
  };
  const lens = [read("embedding", `${stack}.blocks.0.input`)];
  y.blocks.forEach((_, i) => {
    const block = `${stack}.blocks.${i}`;
    for (const branch of branchesOf(trace, block))
      lens.push(read(`${i + 1} ${BRANCH_NAMES[branch]}`, `${block}.after_${branch}`));
  });
  return lens;
}
