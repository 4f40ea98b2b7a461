/* A chat with a chat model; for any other model, texts that it continues. Each token can be selected. It then shows its
probability and the likeliest tokens at its place, and the text can be continued from any of them.

The backend computes: the server of serve.py, or the page of a run itself. It has

  model    {id, is_chat, context, alphabet, eot, questions}, as from /v1/models
  hint     a text about the model
  write({message, turns, start, temperature, signal})
           an async generator of the tokens that follow those of the message. turns: what was said before it; start: the
           text that the tokens follow. Throws an error that is `full` if the context has no room for more.
  explain(turns, tokens, id)
           optional: shows how the probability of a token was computed, which followed these tokens of a reply */

const SPEAKERS = { user: "You", assistant: "The model", text: "The text" };
const EXAMPLES = 4; // the largest number of questions that are offered

const quoted = (text) => `“${text.replaceAll("\n", "↵")}”`;
const note = (...texts) => h("p", { class: "note" }, ...texts);

/** A title for the model of this checkpoint or folder. */
function nameOf(path) {
  const [folder] = path.replace(/[/\\][^/\\]*\.pt$/, "").match(/[^/\\]*$/);
  return folder.charAt(0).toUpperCase() + folder.slice(1).replaceAll("_", " ");
}

class Chat {
  /** root: an empty element, which scrolls. */
  constructor(root, backend) {
    Object.assign(this, { root, backend, model: backend.model });
    // {role, content, start, tokens, problem}: a user's message has content. Those of the model have tokens: entries of the
    // API's logprobs, {id, token, bytes, logprob, top_logprobs}, and `from`, the first message that the model saw.
    this.messages = [];
    this.first = 0; // index of the first message that still fits into the model's context
    this.running = null; // AbortController of the request in progress
    this.edited = null; // index of the user's message that is being edited
    this.build();
    const store = `humptygpt ${this.model.id}`;
    Object.assign(this, JSON.parse(sessionStorage.getItem(store)));
    addEventListener("pagehide", () => {
      sessionStorage.setItem(store, JSON.stringify({ messages: this.messages, first: this.first }));
    });
    document.addEventListener("keydown", ({ key }) => {
      if (key !== "Escape" || root.hidden) return;
      if (this.running) this.running.abort();
      else if (this.edited !== null) this.stopEditing();
    });
    this.draw();
    scrollToEnd(root);
  }

  build() {
    const name = (document.title = nameOf(this.model.id));
    const hint = `${this.backend.hint} Enter sends, Escape stops. The stronger the colour of a token, the less likely `;
    const select = "it was. Select one to see what else could have come, and go on from there.";
    this.header = h("header", {}, h("h1", {}, name), note(hint + select));
    this.log = h("main");
    this.status = h("p", { class: "unseen", role: "status" });
    const asked = this.model.is_chat ? "Say something" : "Begin a text";
    const field = { id: "message", rows: 2, maxlength: 20000, placeholder: asked, "aria-label": asked };
    this.input = h("textarea", { ...field, onkeydown: (event) => this.typed(event) });
    this.send = button("", () => this.say(this.input.value), { id: "send" });
    this.stop = button("Stop", () => this.running?.abort(), { id: "stop" });
    const range = { id: "temperature", type: "range", min: 0, max: 1.5, step: 0.1, value: 0.7 };
    const degree = h("output", {}, "0.7");
    this.temperature = h("input", { ...range, oninput: ({ target }) => (degree.textContent = target.value) });
    const temperature = h("label", { class: "control" }, "Temperature", this.temperature, degree);
    const buttons = [this.send, this.stop, button("New", () => this.clear())];
    const controls = h("div", { class: "controls" }, this.input, buttons, temperature);
    this.root.append(this.header, this.log, h("footer", {}, this.status, controls));
  }

  isEnd(token) {
    return token?.id === this.model.eot;
  }

  isKnown(char) {
    return !this.model.alphabet || this.model.alphabet.includes(char);
  }

  known(text) {
    return [...text].filter((char) => this.isKnown(char)).join("");
  }

  contentOf({ content, start = "", tokens }) {
    const bytes = tokens?.filter((token) => !this.isEnd(token)).flatMap((token) => token.bytes);
    return bytes ? start + new TextDecoder().decode(new Uint8Array(bytes)) : content;
  }

  /** What the model sees of the messages before one. */
  turns(first, index) {
    const seen = this.messages.slice(first, index);
    return seen.map((message) => ({ role: message.role, content: this.known(this.contentOf(message)).trim() }));
  }

  // ----------------------------------------------------------------------------------
  // Show the conversation

  draw() {
    const { log, model } = this;
    log.replaceChildren(...this.messages.map((message, index) => this.drawMessage(message, index)));
    const questions = this.messages.length ? [] : [...new Set(model.questions)].slice(0, EXAMPLES);
    if (questions.length) {
      const buttons = questions.map((text) => button(text, () => this.say(text)));
      log.append(note("It learned from conversations that begin like this:"), h("div", { class: "tools controls" }, buttons));
    }
    this.stop.disabled = !this.running;
    this.send.disabled = Boolean(this.running);
    this.send.textContent = this.edited === null ? (model.is_chat ? "Send" : "Write") : "Change";
    if (document.activeElement === document.body) log.lastElementChild?.focus({ preventScroll: true });
  }

  drawMessage(message, index) {
    const { role, start = "", tokens, problem } = message;
    const paragraph = h("p", {}, h("span", {}, this.struck(start)));
    const entry = () => paragraph.querySelector("[aria-expanded=true]") ?? paragraph.querySelector(".token");
    walkable(paragraph, { items: ".token", entry });
    const card = h("article", { class: role, "aria-label": SPEAKERS[role], tabindex: -1 }, paragraph);
    if (tokens) {
      const add = this.tokenWriter(paragraph, index);
      tokens.forEach(add);
      if (!this.running) add(null);
    } else {
      paragraph.append(...this.struck(message.content));
    }
    const tools = this.running ? [] : this.tools(message, index);
    if (tools.length) card.append(h("div", { class: "tools controls" }, tools));
    if (index === this.first - 1) {
      card.append(note("The model no longer sees the conversation up to here: its context is full."));
    }
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
      const goesOn = tokens.length && !this.isEnd(tokens.at(-1));
      if (goesOn) found.push(button("Continue", () => this.write(index, tokens)));
    }
    return found;
  }

  /** Returns a function that shows one more token, or null at the end. The bytes of a character may be spread over
  several tokens; these become one element, which shows the character once it is complete. */
  tokenWriter(paragraph, index) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    let tokens = [];
    let first = 0; // index of tokens[0] in the message
    const show = (text, name) => {
      paragraph.append(this.drawToken(text, name, tokens, index, first));
      first += tokens.length;
      tokens = [];
    };
    return (token) => {
      const ends = this.isEnd(token);
      const text = token && !ends ? decoder.decode(new Uint8Array(token.bytes), { stream: true }) : decoder.decode();
      if (token && !ends) tokens.push(token);
      if (text) show(text, "token");
      if (!ends) return;
      tokens.push(token);
      show("end", "token end");
    };
  }

  drawToken(text, name, tokens, index, first) {
    const probability = Math.exp(tokens.reduce((sum, token) => sum + token.logprob, 0));
    const title = percent(probability);
    const described = { title, "aria-label": `${quoted(text)}, ${title}`, "aria-expanded": false };
    const look = { class: name, style: `--doubt: ${1 - probability}` };
    const found = h("span", { role: "button", tabindex: first ? -1 : 0, ...described, ...look }, text);
    found.onclick = () => getSelection().isCollapsed && this.toggle(found, tokens, index, first);
    found.onkeydown = (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      this.toggle(found, tokens, index, first);
    };
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
    found.parentElement.after(panel);
    panel.scrollIntoView({ block: "nearest" });
    panel.querySelector("button")?.focus({ preventScroll: true });
  }

  choices(token, index, place) {
    const before = () => this.messages[index].tokens.slice(0, place);
    const label = (each) => (this.isEnd(each) ? "end" : quoted(each.token));
    const had = `${label(token)} had a probability of ${percent(Math.exp(token.logprob))}. The likeliest here:`;
    const items = token.top_logprobs.map((other) => {
      const probability = Math.exp(other.logprob);
      const choice = [h("code", {}, label(other)), h("span", {}, percent(probability))];
      const choose = () => this.write(index, [...before(), { ...token, ...other }]);
      return h("li", {}, button(choice, choose, { style: `--probability: ${probability}` }));
    });
    const explain = () => this.backend.explain(this.turns(token.from, index), before(), token.id);
    const how = this.backend.explain && button("How it was computed", explain);
    return [note(had), h("ol", {}, items), how ?? ""];
  }

  // ----------------------------------------------------------------------------------
  // What the user does

  typed(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.say(this.input.value);
  }

  say(text) {
    const { messages, model } = this;
    if (!text.trim() || this.running) return;
    if (this.edited !== null) {
      messages.splice(this.edited, model.is_chat ? messages.length : 1);
      this.first = 0;
    }
    this.stopEditing();
    if (model.is_chat) messages.push({ role: "user", content: text }, { role: "assistant" });
    else messages.push({ role: "text", start: text });
    this.write(messages.length - 1, []);
    scrollToEnd(this.root);
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
    const add = this.tokenWriter(card.firstChild, index);
    try {
      while (!this.isEnd(message.tokens.at(-1)) && !(await this.receive(message, index, own.signal, add)));
    } catch (error) {
      if (error.name !== "AbortError") message.problem = error.message;
    }
    if (this.running !== own) return;
    this.running = null;
    this.status.textContent = this.contentOf(message);
    this.keepEnd(() => this.draw()); // it brings buttons back
  }

  /** Change the conversation. If its end was in view, it stays in view. */
  keepEnd(change) {
    const { root } = this;
    const atEnd = root.scrollHeight - root.clientHeight - root.scrollTop < 80;
    change();
    if (atEnd) scrollToEnd(root);
  }

  /** Add the backend's tokens to a message. Returns false if the oldest exchange had to be forgotten instead. */
  async receive(message, index, signal, add) {
    const seen = { turns: this.turns(this.first, index), start: this.known(message.start ?? "") };
    const temperature = Number(this.temperature.value);
    try {
      for await (const token of this.backend.write({ message, ...seen, temperature, signal })) {
        message.tokens.push({ ...token, from: this.first });
        this.keepEnd(() => add(token));
      }
    } catch (error) {
      if (!error.full || !this.model.is_chat || index - this.first < 2) throw error;
      this.first += 2;
      return false;
    }
    return true;
  }
}
