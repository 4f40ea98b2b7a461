/* The state of the page, from which all of it is drawn, and the address that holds it.

  text, source    what was typed
  section         id of the section that is read
  t               the selected token; -1: the last one
  layer, head     of attention and MLP
  key             the selected key; -1: the one that the query attends to most
  next            id of the next token that is explained; -1: the most probable one
  number          address of the number in the drawer, or null; trail: those that led to it, the first one first
  sampling        temperature, top_k, top_p, min_p, greedy

The state is what was asked for, and holds for other texts, too; resolve() gives what the trace of a text has of it.
arithmetic.js is needed. */

const LIMITS = { temperature: [0.1, 2], top_k: [0, 100], top_p: [0.05, 1], min_p: [0, 0.5] };
const OFF = { temperature: 0.8, top_k: 0, top_p: 1, min_p: 0, greedy: false }; // the temperature is sample.py's
const COUNTED = ["t", "layer", "head", "key", "next"];
const TRAIL = 20; // the largest number of steps back

function initialState(sections, texts) {
  return {
    ...{ text: texts.text, source: texts.source, section: sections[0] },
    ...{ t: -1, layer: 0, head: 0, key: -1, next: -1, number: null, trail: [], sampling: { ...OFF } },
  };
}

/** Read the state from an address. Missing and invalid parts have their initial values, and these texts. */
function readAddress(hash, sections, texts) {
  const state = initialState(sections, texts);
  const query = new URLSearchParams(hash.replace(/^#/, ""));
  for (const id of ["text", "source"]) if (query.has(id)) state[id] = query.get(id);
  if (sections.includes(query.get("section"))) state.section = query.get("section");
  const numbers = query
    .getAll("number")
    .filter((address) => ADDRESS.test(address))
    .slice(-TRAIL);
  state.number = numbers.pop() ?? null;
  if (state.number) Object.assign(state, changesTo(state.number));
  for (const name of COUNTED) if (/^(-1|\d{1,9})$/.test(query.get(name))) state[name] = +query.get(name);
  for (const name of ["layer", "head"]) state[name] = Math.max(state[name], 0);
  state.trail = numbers;
  for (const [name, [least, most]] of Object.entries(LIMITS)) {
    const value = parseFloat(query.get(name));
    if (value >= least && value <= most) state.sampling[name] = value;
  }
  state.sampling.greedy = query.get("greedy") === "1";
  return state;
}

const ADDRESS = /^\w+(\.\w+)*(:\d+(,\d+){1,2}|\.(mean|std|rms):\d+)$/;

/** The address of a state: its texts, and its differences from the initial state. more: other keys and values. */
function writeAddress(state, more) {
  const query = new URLSearchParams({ section: state.section, ...more });
  const initial = initialState([], {});
  // with a number, all of them, because the number would select its own
  for (const name of COUNTED) if (state.number || state[name] !== initial[name]) query.set(name, state[name]);
  for (const address of state.number ? [...state.trail, state.number] : []) query.append("number", address);
  for (const name of Object.keys(LIMITS)) if (state.sampling[name] !== OFF[name]) query.set(name, state.sampling[name]);
  if (state.sampling.greedy) query.set("greedy", 1);
  query.set("text", state.text);
  if (state.source) query.set("source", state.source);
  return `#${query}`;
}

/** Limit what a state selects to what this trace has; next may still be -1. */
function resolve(state, model, trace, stack) {
  const { config } = model;
  const last = trace.idx.length - 1;
  const t = state.t < 0 ? last : Math.min(state.t, last);
  const layer = Math.min(state.layer, config.n_layer - 1);
  const head = Math.min(state.head, config.n_head - 1);
  const attention = stack && lookUp(trace, `${stack}.blocks.${layer}.${trace.source ? "cross_attn" : "attn"}`);
  const keys = trace.source ? Math.max(trace.source.idx.length, last + 1) : last + 1;
  const [strongest] = attention ? likeliest(attention.weights[head][t], 1) : [0];
  const key = state.key < 0 ? strongest : Math.min(state.key, keys - 1);
  const next = state.next < model.tokenizer_vocab_size ? state.next : -1;
  return { ...state, t, layer, head, key, next };
}

/** The changes of a state that explain the number at an address: its token, layer, head, key and next token. */
function changesTo(address) {
  const { path, at } = parseAddress(address);
  const changes = { number: address };
  const layer = path.match(/(?:blocks|layers)\.(\d+)/);
  if (layer) changes.layer = +layer[1];
  if (path.startsWith("gradient.")) return changes;
  const ofSource = path.startsWith("source") || path.includes(".context.");
  if (at.length === 3) Object.assign(changes, { head: at[0], key: at[2] });
  if (!ofSource) changes.t = at.at(-2) ?? at[0];
  else if (at.length < 3) changes.key = at[0];
  if (path === "logits" || path === "probs") changes.next = at[1];
  return changes;
}
