/* The sections on text: how it is written and becomes tokens, vectors and, at the end, probabilities. */

// --------------------------------------------------------------------------------------
// Writing

function writingPanel(app) {
  return [
    sentence(() => {
      const { greedy, temperature } = app.state.sampling;
      if (greedy) return "Greedy: the most probable token is appended. It soon repeats itself.";
      return (
        `A token is drawn at random, each with its probability at temperature ${temperature}. The section on softmax ` +
        `explains the temperature, and filters that leave out unlikely tokens.`
      );
    }),
    sentence(() => windowText(app)),
    drawn(() => table("The context's last tokens", ["position", "token", "number: id"], contextRows(app), [0, 2])),
    !app.stack && [
      h("h3", {}, "The window network"),
      rowStrip(app, "window: its input", () => "window", { unit: "input" }),
      Array.from({ length: app.config.n_layer }, (_, i) => [
        rowStrip(app, `layer ${i + 1}, before activation`, () => `layers.${i}.linear`, { unit: "neuron" }),
        rowStrip(app, `layer ${i + 1}, neurons`, () => `layers.${i}.activation`, { unit: "neuron" }),
      ]),
    ],
  ];
}

function windowText(app) {
  const { idx } = app.trace;
  const { block_size, window, model } = app.config;
  const left = app.translates ? 0 : app.read.ids.length - idx.length;
  const reach = model === "window_mlp" ? ` Of these the network sees the last ${window}.` : "";
  const lost = left
    ? ` ${tokens(left)} before them left it when it was full, where its newest half is kept: the model knows nothing ` +
      `of them.`
    : "";
  return (
    `The model's context, all that it can read, has room for ${tokens(block_size)}; ${count(idx.length)} ` +
    `${idx.length === 1 ? "is" : "are"} in it.${reach}${lost} The numbers of a new token are computed; those of the ` +
    `tokens before it stay as they are.`
  );
}

function contextRows(app) {
  const { idx } = app.trace;
  const first = Math.max(idx.length - 12, 0);
  return idx.slice(first).map((id, i) => [`${first + i}`, h("code", {}, shown(app.tokenizer, id)), `${id}`]);
}

// --------------------------------------------------------------------------------------
// Embeddings and sub-words

const NEIGHBOURS = 8;
const NEAREST = "Nearest neighbours of its vector, by cosine: 1 has its direction, 0 is unrelated";

function embeddingsPanel(app) {
  const single = "In this run a token is a single number, so no two tokens are alike.";
  return [
    sentence(
      () =>
        `The token at position ${app.at.t} (from 0), ${tokenName(app, app.at.t)}, has the id ` +
        `${app.trace.idx[app.at.t]} of ${count(app.model.tokenizer_vocab_size)}; to the model it is these ` +
        `${app.config.n_embd} features.`,
    ),
    rowStrip(app, "token embedding", () => "wte"),
    app.config.embedding === "number"
      ? missingNote(single, "article/01_embeddings/2-embedding.py")
      : drawn(() => table(NEAREST, ["token", "cosine"], neighbours(app), [1])),
  ];
}

function neighbours(app) {
  const { data, shape } = app.model.weights.wte.weight;
  const own = app.trace.wte[app.at.t];
  const length = Math.sqrt(dot(own, own));
  const cosines = Float64Array.from({ length: app.model.tokenizer_vocab_size }, (_, id) => {
    const row = data.subarray(id * shape[1], (id + 1) * shape[1]);
    return dot(own, row) / (length * Math.sqrt(dot(row, row)) || 1);
  });
  cosines[app.trace.idx[app.at.t]] = -2; // leave out the token itself
  return likeliest(cosines, NEIGHBOURS).map((id) => [h("code", {}, shown(app.tokenizer, id)), digits(cosines[id])]);
}

const MERGES_SHOWN = 40;

function subwordsPanel(app) {
  return [h("p", {}, SUBWORDS[app.tokenizer.name]), drawn(() => mergeTable(app))];
}

const MERGED =
  "Of the neighbours that together are a token, those that became one first (the lowest rank) are merged first.";
const BYTES = "What is no token is spelled in bytes.";
const SUBWORDS = {
  sentencepiece: `A word starts as characters, ▁ for a space. ${MERGED} ${BYTES}`,
  bpe: `A word starts as bytes. ${MERGED}`,
  gpt2: `A word starts as bytes. ${MERGED}`,
};

/** The parts of the text, or of the source if nothing is translated yet, and the index of the selected token. */
function selectedToken(app) {
  const { text: typed, source } = app.read;
  if (app.translates && !typed) return { text: source, token: app.at.key };
  const text = app.tokenizer.eot === null ? typed : typed.replace(/^<\|endoftext\|>/, "");
  return { text, token: app.at.t - (app.trace.idx.length - app.tokenizer.encode(text).length) };
}

/** The steps by which the part of the text around the selected token became tokens. */
function mergeTable(app) {
  const { text, token } = selectedToken(app);
  let end = 0;
  const part = app.tokenizer.split(text).find(({ tokens }) => {
    end += tokens.reduce((sum, { ids }) => sum + ids.length, 0);
    return token >= 0 && token < end;
  });
  if (!part) return h("p", { class: "quiet" }, "Type a word, and select one of its tokens.");
  const more = part.merges.length - MERGES_SHOWN;
  const caption = "The part of the text that the selected token is in, merge by merge";
  return [
    table(caption, ["step", "symbols", "rank"], mergeRows(part), [2]),
    more > 0 && h("p", { class: "quiet" }, `${more} more merges.`),
  ];
}

const piece = (text) =>
  signs(text).replace(/[\u0000-\u001f\u0080-\u00a0]/g, (byte) => `\\${hexadecimal(byte.charCodeAt(0))}`);

function mergeRows({ symbols, merges, tokens }) {
  const line = (texts, chosen = -1) => {
    const symbol = (text, i) => h("span", { class: i === chosen ? "merged" : null }, text);
    return h("code", { class: "symbols" }, texts.map(symbol));
  };
  const rows = [["start", line(symbols.map(piece)), ""]];
  const now = [...symbols];
  merges.slice(0, MERGES_SHOWN).forEach(({ at, piece: made, rank }, i) => {
    now.splice(at, 2, made);
    rows.push([`${i + 1}`, line(now.map(piece), at), minus(+rank.toFixed(2))]);
  });
  rows.push(["tokens", line(tokens.map((token) => `${piece(token.piece)} ${token.ids.join(" ")}`)), ""]);
  return rows;
}

// --------------------------------------------------------------------------------------
// Softmax and sampling

/** Filter as sample.py does: temperature, top-k with ties, softmax, top-p, min-p, rescaling; or greedy. Returns logits
and probs after each step. */
function filtered(logits, V, { temperature, top_k, top_p, min_p, greedy }) {
  const scaled = Array.from(logits.subarray(0, V), (x) => x / Math.max(temperature, 1e-30));
  const least = top_k && top_k < V ? Float64Array.from(scaled).sort()[V - top_k] : -Infinity;
  const kept = scaled.map((x) => (x < least ? -Infinity : x));
  let probs = Array.from(softmax(kept));
  if (top_p < 1) {
    const ranked = Float64Array.from(probs).sort().reverse();
    let [before, smallest] = [0, 1];
    for (const p of ranked) {
      if (before >= top_p) break;
      [smallest, before] = [p, before + p];
    }
    probs = probs.map((p) => (p < smallest ? 0 : p));
  }
  const most = probs.reduce((a, b) => Math.max(a, b), 0);
  probs = probs.map((p) => (p < min_p * most ? 0 : p));
  const [best] = likeliest(logits.subarray(0, V), 1);
  if (greedy) probs = probs.map((_, id) => (id === best ? 1 : 0));
  const sum = probs.reduce((a, b) => a + b, 0);
  return { scaled, probs: probs.map((p) => p / sum) };
}

function softmaxPanel(app) {
  const drawnToken = h("p", { class: "status", role: "status" });
  const draw = () => {
    const uniform = Math.random();
    const { probs } = filtered(app.logits(), app.model.tokenizer_vocab_size, app.state.sampling);
    const id = drawFrom(probs, uniform);
    drawnToken.textContent =
      `A random number, ${uniform.toFixed(4)}, falls into “${shown(app.tokenizer, id)}”, ` +
      `whose probability is ${percent(probs[id])}.`;
  };
  const set = (name) => (value) => app.change({ sampling: { ...app.state.sampling, [name]: value } });
  const control = (label, name, step, most = LIMITS[name][1]) => {
    const format = (x) => (x === OFF[name] && name !== "temperature" ? "off" : `${x}`);
    const root = slider(label, { min: LIMITS[name][0], max: most, step, value: OFF[name], format }, set(name));
    return { root, update: () => root.set(app.state.sampling[name]) };
  };
  const heads = ["token", "logit", "exp", "probability", "logit / temperature", "drawn with probability"];
  return [
    sentence(() => softmaxText(app)),
    drawn(() => table("The most probable tokens", heads, softmaxRows(app), [1, 2, 3, 4, 5])),
    h("p", {}, FILTERS),
    group(
      "controls wide",
      control("Temperature", "temperature", 0.1),
      control("Top-k", "top_k", 1, Math.min(app.model.tokenizer_vocab_size, LIMITS.top_k[1])),
      control("Top-p", "top_p", 0.05),
      control("Min-p", "min_p", 0.01),
    ),
    controlRow(button("Draw a token", draw), drawnToken),
  ];
}

const FILTERS =
  "Logits are divided by the temperature: below 1 the likely become likelier. Top-k keeps only the k likeliest " +
  "tokens. Top-p keeps the fewest of the likeliest whose probabilities add up to p. Min-p keeps the tokens that are " +
  "at least min-p times as probable as the likeliest one.";

function softmaxText(app) {
  const logits = app.logits().subarray(0, app.model.tokenizer_vocab_size);
  const { largest, sum } = sumOfExp(logits);
  return (
    `The largest of ${logits.length} logits is ${digits(largest)}; it is subtracted first, which leaves the result ` +
    `the same and avoids overflow. The sum of all exp(logit − ${digits(largest)}) is ${digits(sum)}.${rounded(app)}`
  );
}

function softmaxRows(app) {
  const { scaled, probs } = filtered(app.logits(), app.model.tokenizer_vocab_size, app.state.sampling);
  const logits = app.logits();
  const { largest } = sumOfExp(logits.subarray(0, app.model.tokenizer_vocab_size));
  return likeliest(app.probs(), 10).map((id) => [
    h("code", {}, shown(app.tokenizer, id)),
    button(digits(logits[id]), () => app.open(`logits:${app.at.t},${id}`), { class: "operand" }),
    digits(Math.exp(logits[id] - largest)),
    percent(app.probs()[id]),
    digits(scaled[id]),
    probs[id] ? percent(probs[id]) : "dropped",
  ]);
}
