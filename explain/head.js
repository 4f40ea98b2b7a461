/* The head of the page: the run, the text's tokens and the likeliest next ones. */

/** The first of many texts. */
const firstOf = (texts, separator) => texts.slice(0, 100).join(separator) + (texts.length > 100 ? " …" : "");
const counted = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
const tokens = (n) => counted(n, "token");

function describeRun({ model, progress, parameters, tokenizer }) {
  const kind = { window_mlp: "window network", gpt: "GPT", transformer: "encoder-decoder" }[model.model];
  const { n_members: members, n_layer, n_head, n_embd, block_size } = model;
  const { best_val_loss: best, iter, best_iter: evaluated = iter } = progress;
  return (
    `${kind}${members > 1 ? `, the first of ${members} members` : ""}: ` +
    `${counted(n_layer, "layer")}${model.model === "window_mlp" ? "" : ` × ${counted(n_head, "head")}`}, width ${n_embd}, context ` +
    `${block_size}, ${tokens(tokenizer.pieces.lengths.length)}, ${(parameters / 1e6).toFixed(2)} million parameters. ` +
    `Step ${count(iter)}, ${best ? `validation loss ${best.toFixed(4)} nats a token` : "no evaluation yet"}` +
    `${evaluated === iter ? "" : ` at step ${count(evaluated)}`}${best && members > 1 ? " of their average" : ""}`
  );
}

/** The reason why this run lacks something, and a config whose run has it. */
function missingNote(text, config) {
  const command = h("code", {}, `python train.py config/${config}`);
  return h("div", { class: "missing" }, h("p", {}, text), h("p", {}, "A run that has it: ", command));
}

const signs = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
const hexadecimal = (byte) => `x${byte.toString(16).toUpperCase().padStart(2, "0")}`;

/** The text of a token, with signs for spaces, and in hex the bytes of what would not be seen. */
function shown(tokenizer, id) {
  const text = signs(tokenizer.decode([id]));
  if (!/[\ufffd\p{Cc}\p{Cf}]/u.test(text)) return text;
  return Array.from(tokenizer.pieces[id], hexadecimal).join(" ");
}

/** The ids of the n most probable tokens, the first one first. */
function likeliest(probs, n) {
  const best = [];
  probs.forEach((p, id) => {
    if (best.length === n && p <= probs[best[n - 1]]) return; // nearly all of a large vocabulary
    best.splice(best.findLastIndex((other) => probs[other] >= p) + 1, 0, id);
    best.length = Math.min(best.length, n);
  });
  return best;
}

/** The tokens, one of which is selected, and the characters that were skipped between them. */
function showTokens(app) {
  const { tokenizer, trace, at } = app;
  const list = element("tokens");
  for (const skipped of list.querySelectorAll("s")) skipped.remove();
  while (list.children.length > trace.idx.length) list.lastChild.remove();
  trace.idx.forEach((id, t) => {
    const item = list.children[t] ?? list.appendChild(h("button", { type: "button" }, " "));
    if (item.dataset.id !== `${id}`) {
      const text = shown(tokenizer, id);
      item.dataset.id = id;
      item.firstChild.data = text;
      item.setAttribute("aria-label", `position ${t} (from 0): ${text}, id ${id}`);
    }
    const chosen = t === at.t;
    if (item.tabIndex !== (chosen ? 0 : -1)) item.tabIndex = chosen ? 0 : -1;
    if (item.ariaPressed !== `${chosen}`) item.ariaPressed = chosen;
  });
  const chosen = list.children[at.t];
  showSkipped(app, [...list.children]);
  list.scrollTop = chosen.offsetTop - list.offsetTop - list.clientHeight + chosen.offsetHeight + 8;
  list.scrollLeft = chosen.offsetLeft - list.offsetLeft - list.clientWidth + chosen.offsetWidth + 8;
}

function showSkipped({ read, trace }, items) {
  const begin = trace.idx.length + (read.lost?.target ?? 0) - read.ids.length; // where the field's first token is
  for (const { char, at } of read.skipped.text) {
    const place = begin + at;
    if (place < 0 || place > items.length) continue; // beyond the context
    const struck = h("s", { title: "unknown to this model: skipped" }, signs(char));
    element("tokens").insertBefore(struck, items[place] ?? null);
  }
}

/** A click selects a token, and the arrow keys move the selection. The list listens, since a text has many tokens. */
function listenToTokens(app) {
  const list = element("tokens");
  const items = list.getElementsByTagName("button");
  const tokenAt = ({ target }) => [...items].indexOf(target);
  list.onclick = (event) => tokenAt(event) >= 0 && app.select({ t: tokenAt(event) });
  list.onpointerover = (event) => tokenAt(event) >= 0 && (event.target.title = event.target.ariaLabel);
  list.onkeydown = (event) => {
    const { t } = app.at;
    const to = { ArrowLeft: t - 1, ArrowRight: t + 1, Home: 0, End: items.length - 1 }[event.key];
    if (!items[to]) return;
    event.preventDefault();
    app.select({ t: to });
    items[to].focus();
  };
}

/** The most probable next tokens. A bar appends its token, and its number leads to its sum. */
function showBars(app) {
  const { tokenizer, at } = app;
  const list = element("bars");
  const best = likeliest(app.probs(), SHOWN);
  const last = at.t === app.trace.idx.length - 1;
  element("bars-title").textContent = last ? "Next token" : `After position ${at.t}`;
  const bar = last ? "A bar appends its token." : "A bar goes on from here with its token.";
  element("bars-key").textContent = `${bar} A percentage shows how it was computed.`;
  while (list.children.length > best.length) list.lastChild.remove();
  best.forEach((id, i) => {
    const [choose, number] = (list.children[i] ?? list.appendChild(barItem(app))).children;
    const p = app.probs()[id];
    const text = { "⏎": "⏎ new line", "␣": "␣ space" }[shown(tokenizer, id)] ?? shown(tokenizer, id);
    choose.firstChild.textContent = text;
    choose.lastChild.firstChild.style.width = `${100 * p}%`;
    choose.setAttribute("aria-label", last ? `append ${text}` : `go on with ${text} after position ${at.t}`);
    number.textContent = percent(p);
    number.setAttribute("aria-label", `${percent(p)}: the sum of ${text}`);
    number.setAttribute("aria-pressed", id === at.next);
    for (const press of [choose, number]) Object.assign(press.dataset, { id, p });
  });
  app.enterBars();
}

function barItem(app) {
  const bar = h("span", { class: "track" }, h("span", { class: "bar" }));
  const choose = button([h("code"), bar], () => app.choose(+choose.dataset.id), { class: "choose" });
  const number = button("", () => app.open(`probs:${app.at.t},${number.dataset.id}`), { class: "number" });
  return h("li", {}, choose, number);
}
