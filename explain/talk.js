/* The conversation with a chat model, over the rest of its page, which shows how it computes. */

/** The text that the page of a chat model starts with: the beginning of a conversation. */
function openingOf({ start, questions }) {
  const [, said, rest] = (start || questions[0] || "").match(/^(.*?)(<\|im_end\|>.*)?$/s);
  return said && `<|im_start|>user\n${said}${rest ?? "<|im_end|>\n<|im_start|>assistant\n"}`;
}

/** The backend of the chat: the model of this page. */
class Talk {
  constructor(app) {
    const { data, tokenizer } = app;
    const { name, questions } = data;
    this.app = app;
    this.model = { id: name, is_chat: true, alphabet: data.tokenizer.alphabet, eot: tokenizer.eot, questions };
    this.hint = "A chat model that runs in this page, without a network.";
    this.chat = new Chat(element("talk"), this);
    this.chat.header.append(button("See how it computes", () => this.explainLast()));
    element("sections").prepend(button("Talk", () => app.goTo("talk")));
    element("name").textContent = document.title;
  }

  /** Show the conversation, or the rest of the page. */
  show(on) {
    if (on !== element("talk").hidden) return;
    element("talk").hidden = !on;
    element("page").inert = on;
    if (on) this.chat.input.focus();
  }

  async *write({ message, turns, temperature, signal }) {
    const { desk, model, tokenizer } = this.app;
    const sampling = { ...OFF, temperature };
    const ids = message.tokens.map(({ id }) => id);
    while (ids.at(-1) !== tokenizer.eot) {
      const { logits, probs, problem, full } = await desk.ask("reply", { turns, ids });
      if (problem) throw Object.assign(new Error(problem), { full });
      if (!probs || signal.aborted) return;
      const id = drawFrom(filtered(logits, model.tokenizer_vocab_size, sampling).probs, Math.random());
      ids.push(id);
      const top_logprobs = likeliest(probs, 5).map((other) => this.describe(other, probs));
      yield { ...this.describe(id, probs), top_logprobs };
    }
  }

  describe(id, probs) {
    const { tokenizer } = this.app;
    const text = tokenizer.decode([id]);
    const token = text.includes("\ufffd") ? shown(tokenizer, id) : text;
    return { id, token, bytes: [...tokenizer.pieces[id]], logprob: Math.log(probs[id]) };
  }

  /** Show how the probability of a token was computed, or only what comes before it. */
  explain(turns, tokens, id = null) {
    const { app } = this;
    const ids = [...app.tokenizer.encodeTurns(turns), ...tokens.map((token) => token.id)];
    const t = ids.length - 1 - contextStart(app.config, ids.length);
    const number = id === null ? null : `probs:${t},${id}`;
    const text = app.tokenizer.decode(ids);
    element("text").value = text;
    app.goTo("model", { text, t: -1, key: -1, next: id ?? -1, number }, ids);
    scrollToEnd(element("text"));
    if (number) app.settled.then(() => app.drawer.enter());
  }

  /** Show the text of the conversation, up to the last token. */
  explainLast() {
    const { messages } = this.chat;
    const { tokens } = messages.at(-1) ?? {};
    if (!tokens?.length) return this.app.goTo("model");
    this.explain(this.chat.turns(tokens.at(-1).from, messages.length - 1), tokens.slice(0, -1));
  }
}
