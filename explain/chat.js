"use strict";

/* A chat with a chat model; for any other model, texts that it continues. Each token can be selected. It then shows its
probability and the likeliest tokens at its place, and the text can be continued from any of them.

Who computes is the backend: the server of serve.py, or the page of a run itself. It has

  model     {id, is_chat, context, alphabet, ends, questions}, as from /v1/models of serve.py
  hint      a text about the model
  places    (optional) buttons that lead elsewhere
  write({message, turns, start, temperature, signal})
            an async generator of the tokens that follow those of the message. turns: what was said before it; start: the
            text that it begins with. Throws an error that is `full` if the context has no room for more.
  explain(turns, tokens, id)
            (optional) show how the probability of a token was computed, after these tokens of a reply

elements.js is needed. */

const SPEAKERS = { user: "You", assistant: "The model", text: "The text" };
const EXAMPLES = 4; // the largest number of questions that are offered
const quoted = (text) => `“${text.replaceAll("\n", "↵")}”`;

/** The name of a model, for a title, from the path of its checkpoint or of its folder. */
function nameOf(id) {
  const folder = id.replace(/[/\\][^/\\]*\.pt$/, "").split(/[/\\]/);
  const name = folder.at(-1).replaceAll("_", " ");
  return name.charAt(0).toUpperCase() + name.slice(1);
}

class Chat {
  /** root: an empty element, in which the chat is made. view: the element that scrolls. */
  constructor(root, view, backend) {
    const { model } = backend;
    // {role, content, tokens, problem}: a user's message has content. Those of the model have tokens: entries of the
    // API's logprobs, {id, token, bytes, logprob, top_logprobs}, and `from`, the first message that the model saw.
    this.messages = [];
    this.first = 0; // index of the first message that still fits into the model's context
    this.running = null; // AbortController of the request in progress
    this.edited = null; // index of the user's message that is being edited
    Object.assign(this, { root, view, backend, model });
    this.build();
    const store = `humptygpt ${model.id}`;
    Object.assign(this, JSON.parse(sessionStorage.getItem(store) ?? "{}"));
    addEventListener("pagehide", () => {
      const { messages, first } = this;
      sessionStorage.setItem(store, JSON.stringify({ messages, first }));
    });
    this.draw();
    view.scrollTop = view.scrollHeight;
  }

  build() {
    const { model, backend } = this;
    const asked = model.is_chat ? "Say something" : "Begin a text";
    const title = h("h1", {}, nameOf(model.id));
    document.title = title.textContent;
    const scale = h("span", { class: "scale" });
    const colours = ["The stronger the colour of a token, the less likely it was ", scale];
    const select = ". Select one to see what else could have come, and go on from there.";
    const header = h("header", {}, h("div", { class: "controls" }, title, backend.places));
    header.append(h("p", { class: "quiet" }, `${backend.hint} Enter sends, Escape stops.`));
    header.append(h("p", { class: "quiet" }, colours, select));
    this.log = h("main");
    this.status = h("p", { class: "unseen", role: "status" });
    this.input = h("textarea", {
      id: "message",
      rows: 2,
      maxlength: 20000,
      autocomplete: "off",
      placeholder: asked,
      "aria-label": asked,
      onkeydown: (event) => {
        if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
        event.preventDefault();
        form.requestSubmit();
      },
    });
    this.send = h("button", { id: "send" });
    this.stop = button("Stop", () => this.running?.abort(), { id: "stop" });
    const degree = h("output", {}, "0.7");
    const range = { id: "temperature", type: "range", min: 0, max: 1.5, step: 0.1, value: 0.7 };
    this.temperature = h("input", { ...range, oninput: ({ target }) => (degree.textContent = target.value) });
    const temperature = h("label", { class: "control" }, "Temperature", this.temperature, degree);
    const buttons = [this.send, this.stop, button("New", () => this.clear())];
    const form = h("form", { class: "controls" }, this.input, buttons, temperature);
    form.onsubmit = (event) => {
      event.preventDefault();
      this.say(this.input.value);
    };
    document.addEventListener("keydown", ({ key }) => {
      if (key !== "Escape" || !this.root.checkVisibility()) return;
      if (this.running) this.running.abort();
      else if (this.edited !== null) this.stopEditing();
    });
    this.root.append(header, this.log, h("footer", {}, this.status, form));
  }

  isEnd(id) {
    return this.model.ends.includes(id);
  }

  isKnown(char) {
    return !this.model.alphabet || this.model.alphabet.includes(char);
  }

  known(text) {
    return [...text].filter((char) => this.isKnown(char)).join("");
  }

  contentOf({ content, tokens }) {
    if (!tokens) return content;
    const bytes = tokens.filter(({ id }) => !this.isEnd(id)).flatMap((token) => token.bytes);
    return new TextDecoder().decode(new Uint8Array(bytes));
  }

  // ----------------------------------------------------------------------------------
  // Show the conversation

  draw() {
    const { log, model } = this;
    log.replaceChildren(...this.messages.map((message, index) => this.drawMessage(message, index)));
    if (!this.messages.length && model.questions?.length) log.append(...this.drawQuestions());
    this.stop.disabled = !this.running;
    this.send.disabled = Boolean(this.running);
    this.send.textContent = this.edited === null ? (model.is_chat ? "Send" : "Write") : "Change";
    if (document.activeElement === document.body) log.lastElementChild?.focus({ preventScroll: true });
  }

  drawQuestions() {
    const questions = [...new Set(this.model.questions)].slice(0, EXAMPLES);
    const buttons = questions.map((text) => button(text, () => this.say(text)));
    return [note("It learned from conversations that begin like this:"), h("div", { class: "tools" }, buttons)];
  }

  drawMessage(message, index) {
    const paragraph = h("p");
    if (message.tokens) {
      const add = this.tokenWriter(paragraph, index);
      message.tokens.forEach(add);
      if (!this.running) add(null);
    } else {
      paragraph.append(...this.struck(message.content));
    }
    const { role, start, problem } = message;
    const card = h("article", { class: role, "aria-label": SPEAKERS[role], tabindex: -1 }, paragraph);
    card.append(h("div", { class: "tools" }, this.running ? [] : this.tools(message, index)));
    if (index === this.first - 1) {
      card.append(note("The model no longer sees the conversation up to here: its context is full."));
    }
    if (start && this.known(start) !== start) card.append(note("You began: ", this.struck(start)));
    if (problem) card.append(note(problem));
    return card;
  }

  /** The model does not see the characters that it does not know; they are struck through. */
  struck(text) {
    return Array.from(text, (char) => (this.isKnown(char) ? char : h("s", {}, char)));
  }

  tools({ role, tokens }, index) {
    const found = [];
    if (role !== "assistant") found.push(button("Edit", () => this.edit(index)));
    if (role === "text" || index === this.messages.length - 1) {
      found.push(button("Again", () => this.write(index, [])));
      const last = tokens.at(-1);
      if (last && !this.isEnd(last.id)) found.push(button("Continue", () => this.write(index, tokens)));
    }
    return found;
  }

  /** Returns a function that shows one more token, or null at the end. The bytes of a character may be spread over
  several tokens; these become one element, which shows the character once it is complete. */
  tokenWriter(paragraph, index) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    let tokens = [];
    let first = 0; // index of tokens[0] in the message
    return (token) => {
      const ends = this.isEnd(token?.id);
      const text = token && !ends ? decoder.decode(new Uint8Array(token.bytes), { stream: true }) : decoder.decode();
      if (token && !ends) tokens.push(token);
      if (text) {
        paragraph.append(this.drawToken(text, tokens, index, first));
        first += tokens.length;
        tokens = [];
      }
      if (ends) {
        const mark = this.drawToken("end", [token], index, first);
        mark.classList.add("end");
        paragraph.append(mark);
        first += 1;
      }
    };
  }

  drawToken(text, tokens, index, first) {
    const probability = Math.exp(tokens.reduce((sum, token) => sum + token.logprob, 0));
    const title = tokens[0].logprob === null ? "the first token" : percent(probability);
    const open = () => this.toggle(found, tokens, index, first);
    const found = h(
      "span",
      {
        class: "token",
        role: "button",
        style: `--doubt: ${1 - probability}`,
        tabindex: first ? -1 : 0, // the arrow keys move from token to token
        title,
        "aria-label": `${quoted(text)}, ${title}`,
        "aria-expanded": false,
        onclick: () => getSelection().isCollapsed && open(),
        onkeydown: (event) => {
          const next = { ArrowRight: found.nextElementSibling, ArrowLeft: found.previousElementSibling }[event.key];
          if (next) {
            found.tabIndex = -1;
            next.tabIndex = 0;
            next.focus();
          } else if (event.key === "Enter" || event.key === " ") {
            open();
          } else {
            return;
          }
          event.preventDefault();
        },
      },
      text,
    );
    return found;
  }

  // ----------------------------------------------------------------------------------
  // Show the likeliest tokens

  toggle(found, tokens, index, first) {
    const isOpen = found.ariaExpanded === "true";
    this.log.querySelector(".likeliest")?.remove();
    for (const each of this.log.querySelectorAll(".token[aria-expanded=true]")) each.ariaExpanded = "false";
    if (isOpen) return;
    found.ariaExpanded = "true";
    const panel = h("div", { class: "likeliest", role: "group", "aria-label": "What else could have come here" });
    tokens.forEach((token, i) => panel.append(...this.choices(token, index, first + i)));
    panel.onkeydown = (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.toggle(found, tokens, index, first);
      found.focus();
    };
    found.closest("article").querySelector("p").after(panel);
    panel.scrollIntoView({ block: "nearest" });
    panel.querySelector("button")?.focus({ preventScroll: true });
  }

  choices(token, index, place) {
    const { messages, backend } = this;
    const label = (each) => (this.isEnd(each.id) ? "end" : quoted(each.token));
    if (token.logprob === null) return [h("h2", {}, `${label(token)} is the first token: nothing precedes it.`)];
    const had = `${label(token)} had a probability of ${percent(Math.exp(token.logprob))}. The likeliest here:`;
    const items = token.top_logprobs.map((other) => {
      const probability = Math.exp(other.logprob);
      const style = `--probability: ${probability}`;
      const choice = [h("code", {}, label(other)), h("span", {}, percent(probability))];
      return h("li", {}, button(choice, () => this.choose(index, place, other), { style }));
    });
    const before = () => [this.turns(token.from, index), messages[index].tokens.slice(0, place), token.id];
    const explain = button("How it was computed", () => backend.explain(...before()));
    return [h("h2", {}, had), h("ol", {}, items), backend.explain ? explain : ""];
  }

  choose(index, place, other) {
    const { tokens } = this.messages[index];
    this.write(index, [...tokens.slice(0, place), { ...tokens[place], ...other }]);
  }

  // ----------------------------------------------------------------------------------
  // What the user does

  say(text) {
    const { messages, model } = this;
    if (!text.trim() || this.running) return;
    this.input.value = "";
    if (this.edited !== null) {
      messages.splice(this.edited, model.is_chat ? messages.length : 1);
      this.first = 0;
      this.edited = null;
    }
    if (model.is_chat) messages.push({ role: "user", content: text }, { role: "assistant" });
    else messages.push({ role: "text", start: text });
    this.write(messages.length - 1, []);
    this.view.scrollTop = this.view.scrollHeight;
  }

  clear() {
    this.running?.abort();
    Object.assign(this, { messages: [], first: 0 });
    this.stopEditing();
    this.input.focus();
  }

  edit(index) {
    this.edited = index;
    this.input.value = this.contentOf(this.messages[index]);
    this.draw();
    this.input.focus();
  }

  stopEditing() {
    this.edited = null;
    this.input.value = "";
    this.draw();
  }

  /** Let the model write a message that begins with these tokens. */
  async write(index, tokens) {
    this.running?.abort();
    const own = (this.running = new AbortController());
    const message = this.messages[index];
    Object.assign(message, { tokens: [...tokens], problem: "" });
    if (this.model.is_chat) this.messages.length = index + 1;
    if (this.first > index) this.first = 0;
    this.draw();
    const card = this.log.children[index];
    card.classList.add("running");
    card.scrollIntoView({ block: "nearest" });
    const paragraph = card.querySelector("p");
    const add = this.tokenWriter(paragraph, index);
    paragraph.replaceChildren();
    message.tokens.forEach(add);
    try {
      while (!this.isEnd(message.tokens.at(-1)?.id) && !(await this.receive(message, index, own.signal, add)));
    } catch (error) {
      if (error.name !== "AbortError") message.problem = error.message;
    }
    if (this.running !== own) return;
    this.running = null;
    this.status.textContent = this.contentOf(message);
    this.draw();
  }

  /** Add the tokens of the backend to a message. Returns false if the oldest exchange had to be forgotten. */
  async receive(message, index, signal, add) {
    const turns = this.turns(this.first, index);
    const start = this.known(message.start ?? "");
    const temperature = Number(this.temperature.value);
    try {
      for await (const token of this.backend.write({ message, turns, start, temperature, signal })) {
        message.tokens.push({ ...token, from: this.first });
        this.follow(() => add(token));
      }
    } catch (error) {
      if (!error.full || !this.model.is_chat || index - this.first < 2) throw error;
      this.first += 2;
      return false;
    }
    return true;
  }

  /** What the model sees of the messages before one. */
  turns(first, index) {
    const seen = this.messages.slice(first, index);
    return seen.map((message) => ({ role: message.role, content: this.known(this.contentOf(message)).trim() }));
  }

  /** Change the page, and keep its end in view if it was. */
  follow(change) {
    const { view } = this;
    const atEnd = view.scrollHeight - view.clientHeight - view.scrollTop < 80;
    change();
    if (atEnd) view.scrollTop = view.scrollHeight;
  }
}

function note(...texts) {
  return h("p", { class: "note" }, ...texts);
}
