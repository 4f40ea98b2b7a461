/* The sections on what is in a block beside attention: the residual stream, the MLP, norms and dropout. */

function residualPanel(app) {
  const off = new Set();
  const result = switchedOff(app, off);
  const input = () => blockPath(app, "input");
  const branches = Object.entries(BRANCH_NAMES).map(([branch, name]) => {
    const path = (rest) => () => (branchesOf(app.trace, ownBlock(app)).includes(branch) ? blockPath(app, rest) : null);
    return { name, adds: path(BRANCH_OUTPUT[branch]), after: path(`after_${branch}`) };
  });
  const paths = () => [input, ...branches.flatMap(({ adds, after }) => [adds, after])].map((path) => path());
  const scale = () => Math.max(...paths().map((path) => (path ? largest(lookUp(app.trace, path)[app.at.t]) : 0)));
  const plain = "In this run each branch replaces its input: there is no residual stream, and nothing to add up.";
  return [
    controlRow(layerPicker(app)),
    rowStrip(app, "enters the block", input, { scale }),
    branches.map(({ name, adds, after }) => [
      rowStrip(app, `${name} adds`, adds, { scale }),
      rowStrip(app, `after ${name}`, after, { scale }),
    ]),
    app.config.block === "plain" && missingNote(plain, "article/04_residual/2-with.py"),
    drawn(() => contributionList(app)),
    h("h3", {}, "Switch branches off"),
    branchSwitches(app, off, result),
    result,
  ];
}

function contributionList(app) {
  const { t, next } = app.at;
  const list = contributions(app.model, app.trace, app.stack, t, next);
  const sum = addUp(list);
  const most = largest(list.map(({ value }) => value));
  const rows = list.map(({ name, layer, value }) => {
    const width = (50 * Math.abs(value)) / most;
    const style = `${value < 0 ? "right" : "left"}: 50%; width: ${width}%; ${tint(value, 1e-9)}`;
    const title = h("span", {}, layer === undefined ? name : `layer ${layer + 1} ${name}`);
    const bar = h("span", { class: "balance" }, h("span", { style }));
    return h("li", { "data-value": value }, title, h("span", { class: "number" }, signed(value)), bar);
  });
  const cap = app.config.logit_soft_cap ? ", before its soft cap" : "";
  const held = { layernorm: "'s mean and deviation are", rmsnorm: "'s root mean square is" }[app.config.norm];
  const text =
    `Together ${digits(sum)}: the logit${cap} less the mean over all tokens, since softmax ignores what all logits ` +
    `share. Later parts build on earlier ones, so more can depend on a part than it adds: switch it off below.` +
    `${held ? ` The final norm${held} held (see Norm).` : ""} Another next token can be chosen at its bar.`;
  return [
    h("h3", {}, `What each part adds to the logit of “${shown(app.tokenizer, next)}”${cap}, above the mean of all`),
    h("ol", { class: "contributions", "data-sum": sum }, rows),
    h("p", {}, text),
  ];
}

function branchSwitches(app, off, result) {
  const boxes = (_, i) =>
    branchesOf(app.trace, `${app.stack}.blocks.${i}`).map((branch) => {
      const name = `${app.stack}.blocks.${i}.${branch === "cross" ? "cross_attn" : branch}`;
      return toggle(`${i + 1} ${BRANCH_NAMES[branch]}`, true, (on) => {
        off[on ? "delete" : "add"](name);
        result.update();
      });
    });
  return controlRow(Array.from({ length: app.config.n_layer }, boxes));
}

function switchedOff(app, off) {
  const question = () => off.size && { names: [...off], ...untilSelected(app) };
  return answered(app, "off", question, (answer, then) => {
    if (!answer) return h("p", { class: "quiet" }, "All branches are on.");
    const caption = "Next token with all branches, and with what is left";
    return comparison(app, caption, ["all", "left"], [then.probs(), answer.probs]);
  });
}

/** A question to the worker about the tokens up to the selected one. */
function untilSelected(app) {
  return { idx: app.trace.idx.slice(0, app.at.t + 1), source: app.source ?? null };
}

/** The most probable tokens by several predictions, side by side. */
function comparison(app, caption, heads, predictions) {
  const ids = new Set(predictions.flatMap((probs) => likeliest(probs, predictions.length > 2 ? 3 : 5)));
  const rows = [...ids]
    .slice(0, 10)
    .map((id) => [h("code", {}, shown(app.tokenizer, id)), ...predictions.map((probs) => percent(probs[id]))]);
  return table(caption, ["token", ...heads], rows, heads.map((_, i) => i + 1));
}

function mlpPanel(app) {
  const { mlp, mlp_conv, activation } = app.config;
  const path = (rest) => () => blockPath(app, `feed_forward.${rest}`);
  const neurons = { unit: "neuron" };
  const gated = mlp === "gated";
  const squashed = { relu: "ReLU", relu_squared: "ReLU squared" }[activation] ?? `${activation}, a smooth ReLU`;
  const reach = mlp_conv === 1 ? "the token before" : `the ${mlp_conv} tokens before`;
  const convolution =
    `Not quite by itself in this run: by a short convolution each feature first takes a share of the same feature of ` +
    `${reach}.`;
  return [
    controlRow(layerPicker(app)),
    rowStrip(app, "what it reads", path("input")),
    mlp_conv && [h("p", {}, convolution), rowStrip(app, "after the convolution", path("conv"))],
    gated && rowStrip(app, "gates, before activation", path("gate_proj"), neurons),
    rowStrip(app, gated ? "values" : "neurons, before activation", path("up_proj"), neurons),
    h("p", {}, `Then each neuron's ${gated ? "gate" : "sum"} goes through the activation function, ${squashed}.`),
    rowStrip(app, gated ? "gates" : "neurons", path("activation"), neurons),
    gated && rowStrip(app, "gate times value", path("hidden"), neurons),
    rowStrip(app, "what the MLP adds to the stream", path("down_proj")),
    drawn(() => table("The strongest neurons", ["neuron", "activation"], strongestNeurons(app), [1])),
  ];
}

function strongestNeurons(app) {
  const path = blockPath(app, "feed_forward.hidden");
  const row = lookUp(app.trace, path)[app.at.t];
  return likeliest(row.map(Math.abs), Math.min(6, row.length)).map((i) => [
    button(`${i}`, () => app.open(`${path}:${app.at.t},${i}`), { class: "operand" }),
    digits(row[i]),
  ]);
}

function normPanel(app) {
  const norms = ["attn_norm", "cross_norm", "mlp_norm"].filter((name) =>
    lookUp(app.trace, `${app.stack}.blocks.0.${name}`),
  );
  let chosen = 0;
  const where = app.config.block === "post_norm" ? "after" : "before";
  const path = () => blockPath(app, norms[chosen]);
  const parts = [
    rowStrip(app, "before", () => `${path()}.input`),
    sentence(() => normText(app, path())),
    weightStrip(app, "trained gain: a factor for each feature", "weight", path),
    app.config.bias && app.config.norm === "layernorm" && weightStrip(app, "trained bias", "bias", path),
    rowStrip(app, "after", () => `${path()}.output`),
  ].filter(Boolean);
  const names = norms.map((name) => `${where} ${BRANCH_NAMES[name.replace("_norm", "")]}`);
  const root = picker("Norm", names, 0, (i) => {
    chosen = i;
    parts.forEach((part) => part.update());
  });
  let followed = null;
  const follow = () => {
    const path = app.at.number && app.resolvePath(parseAddress(app.at.number).path); // the norm that made the number
    const of = norms.findIndex((name) => path?.includes(`.${name}.`));
    if (of >= 0 && followed !== app.at.number) root.set((chosen = of));
    followed = app.at.number;
  };
  return [controlRow(layerPicker(app), { root, update: follow }), parts];
}

function normText(app, path) {
  const { t } = app.at;
  const norm = lookUp(app.trace, path);
  const link = (name) => button(digits(norm[name][t]), () => app.open(`${path}.${name}:${t}`), { class: "operand" });
  const rms = ": each feature is divided by it and multiplied by its trained gain. RMSNorm subtracts no mean.";
  if (!norm.mean) return ["Root mean square ", link("rms"), rms];
  const std =
    ": from each feature the mean is subtracted, then it is divided by the deviation and multiplied by its trained " +
    `gain${app.config.bias ? " and given its bias" : ""}.`;
  return ["Mean ", link("mean"), ", standard deviation ", link("std"), std];
}

const THINNED = 5;

function dropoutPanel(app) {
  const trained = app.config.dropout;
  const state = { p: trained || 0.1, seed: 0, drawnFor: null };
  const question = () => {
    const asked = untilSelected(app);
    if (state.drawnFor !== JSON.stringify(asked)) return null;
    return { ...asked, p: state.p, seeds: Array.from({ length: THINNED }, (_, i) => state.seed + i) };
  };
  const results = answered(app, "thinned", question, (answer, then) => {
    if (!answer) return h("p", { class: "quiet" }, "Draw thinned networks to see what each of them predicts.");
    const { results } = answer;
    const mean = results[0].map((_, id) => results.reduce((sum, probs) => sum + probs[id], 0) / THINNED);
    const caption = `Next token by ${THINNED} thinned networks, by their mean, and by the whole network`;
    const heads = [...results.map((_, i) => `${i + 1}`), "mean", "whole"];
    return comparison(app, caption, heads, [...results, mean, then.probs()]);
  });
  const draw = () => {
    state.seed += THINNED;
    state.drawnFor = JSON.stringify(untilSelected(app));
    results.update();
  };
  const rate = slider("Probability", { min: 0.05, max: 0.5, step: 0.05, value: state.p }, (p) => (state.p = p));
  const without = "This run was trained without dropout. Thinned, a network that was never trained so predicts worse.";
  const note = trained
    ? h("p", {}, `This run was trained with dropout ${trained}.`)
    : missingNote(without, "article/06_dropout/2-with.py");
  return [note, controlRow(rate, button("Draw thinned networks", draw)), results];
}
