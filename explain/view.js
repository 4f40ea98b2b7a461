"use strict";

/* The page: its text box, the tokens of the text and the probabilities of the next one, computed as you type. */

const SHOWN = 10; // bars
const END_OF_TEXT = "<|endoftext|>";

const element = (id) => document.getElementById(id);

function main() {
  try {
    const data = readData(element("data").textContent, element("data").dataset.checksum);
    show(data, makeModel(data), makeTokenizer(data.tokenizer));
  } catch (error) {
    report(`The data of this page is damaged: ${error.message}. Make the page again with explain.py.`);
  }
}

function report(problem) {
  element("problem").textContent = problem;
  element("problem").hidden = !problem;
}

function show(data, model, tokenizer) {
  const translates = data.task === "translation";
  element("name").textContent = document.title = `HumptyGPT: ${data.name}`;
  const { iter, best_val_loss: best } = data.progress;
  const about = [data.model.model, `iter ${iter}`, best ? `best val loss ${best.toFixed(4)}` : "no evaluation yet"];
  if (!data.metrics.length) about.push("no metrics.jsonl");
  element("about").textContent = about.join(", ");
  element("source-part").hidden = !translates;
  element("text-label").textContent = translates ? "Translation so far" : "Text";
  element(translates ? "source" : "text").value = data.start;
  let trace = null;
  const update = () => {
    try {
      const begin = performance.now();
      const { idx, source } = (translates ? readPair : readText)(model, tokenizer);
      trace = forward(model, idx, { source, before: trace, lastOnly: true });
      report("");
      showTokens(tokenizer, idx);
      showBars(tokenizer, trace.probs[idx.length - 1]);
      const ms = (performance.now() - begin).toFixed(1);
      element("took").textContent = `${idx.length} tokens, ${idx.length - trace.first} of them new: ${ms} ms`;
    } catch (error) {
      for (const id of ["tokens", "bars"]) element(id).replaceChildren(); // those of another text
      report(error.message);
    }
  };
  for (const id of ["text", "source"]) element(id).addEventListener("input", update);
  element("page").hidden = false;
  update();
}

/** The token ids of the text, as sample.py reads a prompt: at most the last block_size of them. */
function readText({ config }, tokenizer) {
  let text = element("text").value;
  let ids = [];
  if (tokenizer.eot !== null && text.startsWith(END_OF_TEXT)) {
    ids = tokenizer.start;
    text = text.slice(END_OF_TEXT.length);
  }
  ids = [...ids, ...tokenizer.encode(text)];
  return { idx: ids.length ? ids.slice(-config.block_size) : tokenizer.start };
}

/** Source and target; a GPT reads one after the other. A target starts with end-of-text, which ends a source. */
function readPair({ config }, tokenizer) {
  const encoder = config.model === "transformer";
  const room = (encoder ? config.block_size : config.block_size >> 1) - 1;
  const words = element("source").value.split(/\s+/).filter((word) => word);
  const source = [...tokenizer.encode(words.join(" ")).slice(0, room), tokenizer.eot];
  const target = tokenizer.encode(element("text").value);
  if (encoder) return { idx: [tokenizer.eot, ...target].slice(0, config.block_size), source };
  return { idx: [...source, ...target].slice(0, config.block_size) };
}

/** What a token stands for, with signs for what cannot be seen. */
function shown(tokenizer, id) {
  return tokenizer.decode([id]).replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

function make(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

function showTokens(tokenizer, idx) {
  const items = idx.map((id) => {
    const item = make("li", "");
    item.append(make("code", shown(tokenizer, id)), " ", make("small", id));
    return item;
  });
  element("tokens").replaceChildren(...items);
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

function showBars(tokenizer, probs) {
  const items = likeliest(probs, SHOWN).map((id) => {
    const item = make("li", "");
    const bar = make("span", "");
    bar.style.width = `${100 * probs[id]}%`;
    item.append(make("code", shown(tokenizer, id)), make("small", `${(100 * probs[id]).toFixed(2)} %`), bar);
    return item;
  });
  element("bars").replaceChildren(...items);
}

document.addEventListener("DOMContentLoaded", main);
