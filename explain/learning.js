/* How the model came to be: the text after each snapshot of its training, one more step of training, and pictures of
how the leaf network learns. */

// --------------------------------------------------------------------------------------
// Snapshots

function learnedPanel(app) {
  let step = app.data.steps[2] ?? 0; // the first snapshot that shows some learning
  let then = app; // with the text that is shown
  const stepOf = (i) => app.data.steps[i];
  const place = () => Math.max(app.data.steps.findLastIndex((each) => each <= step), 0); // of the step in the list
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
    return { step: stepOf(place()), idx: app.trace.idx, source: app.source ?? null, t, layer, head };
  };
  const result = answered(app, "learned", question, (answer, asked) => {
    then = asked;
    // show the present model until there is an answer, so that nothing moves
    const { losses, probs, attention: weights, wte } = answer ?? presentNumbers(then);
    loss.show([NaN, ...losses]);
    if (weights) attention.show(Array.from(weights));
    embedding.show(Array.from(wte));
    const heads = [`after step ${count(stepOf(place()))}`, "now"];
    const text = answer ? learnedText(app, stepOf(place()), losses) : "…";
    return [
      h("p", { role: "status", "data-loss": meanOf(losses) }, text),
      lossRow(then, losses),
      loss.root,
      comparison(then, `Next token after position ${then.at.t}`, heads, [probs, then.probs()]),
      weights ? attention.root : null,
      embedding.root,
    ];
  });
  const named = (i) => `${count(stepOf(i))}${stepOf(i) ? "" : ", before training"}`;
  const limits = { min: 0, max: app.data.steps.length - 1, step: 1, value: place(), format: named };
  const control = slider("Step of training", limits, (i) => ((step = stepOf(i)), result.update()));
  const update = () => control.set(place(), app.data.steps.length - 1);
  return [controlRow({ root: control, update }), app.stack && controlRow(layerPicker(app), headPicker(app)), result];
}

function presentNumbers(app) {
  const { t, head } = app.at;
  const attention = app.stack ? lookUp(app.trace, blockPath(app, "attn.weights"))[head][t] : null;
  return { losses: app.trace.idx.slice(1).fill(NaN), probs: app.probs(), attention, wte: app.trace.wte[t] };
}

function learnedText(app, step, losses) {
  const guessing = Math.log(app.model.tokenizer_vocab_size);
  const rounded = app.data.steps.indexOf(step) < app.data.rounded && step !== app.data.progress.iter;
  const rounding = rounded ? " Its weights are rounded to 8 bits." : "";
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
  return h("p", { class: "losses", "aria-hidden": "true" }, h("code", {}, spans));
}

// --------------------------------------------------------------------------------------
// One step of training

const GRADIENT = "The gradient: by how much the loss changes with each weight, its derivative. Select a number.";

/** The gradient by one row of any weights, and how far a step moves them. Each number opens to its sum. */
function stepPanel(app) {
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
    row.set((state.row = Math.min(state.row, rows.length - 1)), rows.length - 1);
    gradient.update();
    moved.show(Array.from(lookUp(app.trace, path().replace("weights", "moved"))[state.row]));
  };
  const question = () => (app.trace.idx.length > 1 ? { idx: app.trace.idx } : null);
  const result = answered(app, "gradient", question, (answer, then) => {
    if (answer) then.trace.gradient = unpack(answer);
    show();
    const { loss, norm } = answer ?? {};
    const known = answer && `The mean loss of this text is ${digits(loss)}, the length (L2) of its gradient ${digits(norm)}.`;
    return h("p", { role: "status" }, known ?? "A single token has no loss: type another.");
  });
  const short = names.map((name) => name.replace("stack.", ""));
  const weights = picker("Weights", short, names.indexOf(state.name), (i) => ((state.name = names[i]), show()));
  return [result, h("p", {}, GRADIENT), controlRow(weights, row), gradient, moved];
}
