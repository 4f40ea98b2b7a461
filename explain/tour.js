/* The tour: from the last letter to its numbers, through attention to the probabilities of the next one, with the model
of this page. The reader begins it, and can leave it at any stop. */

/** [section, selector of what is pointed at, (app, token) => what is said]. A stop is left out if the model has nothing
for its section. */
const STOPS = [
  [
    "model",
    "#tokens",
    (app, token) =>
      `Your model has read these tokens: single characters, or parts of words. It will say what comes next. We follow ` +
      `the last one, ${token}, on its way through the model.`,
  ],
  [
    "embeddings",
    "#embeddings .strip",
    (app, token) =>
      `To the model ${token} is a list of ${app.config.n_embd} numbers, its embedding, which training found. Each cell ` +
      `is one of them: blue below zero, orange above. Select one to see its digits.`,
  ],
  [
    "attention",
    "#attention .arcs",
    (app, token) =>
      `Attention: what comes next depends on what came before, so ${token} looks back. ${attentionText(app)} What it ` +
      `reads is added to its own numbers. Other heads read from other places.`,
  ],
  [
    "mlp",
    "#mlp .captioned",
    (app, token) =>
      `Then a small network, the multi-layer perceptron (MLP), works on what ${token} has gathered. These are its ` +
      `strongest neurons.`,
  ],
  [
    "residual",
    "#residual .contributions",
    (app) =>
      `So each part of each layer adds to the numbers, and later ones build on earlier ones. A bar says how far a part ` +
      `pushes the score of “${shown(app.tokenizer, app.at.next)}”, to the right for it, to the left against it.`,
  ],
  [
    "softmax",
    "#softmax .captioned",
    (app) =>
      `Softmax turns the scores into probabilities: “${shown(app.tokenizer, app.at.next)}” has ` +
      `${percent(app.probs()[app.at.next])}. One token is drawn at random, a likely one more often ` +
      `than others, and is appended to the text.`,
  ],
  [
    "model",
    "#bars",
    () =>
      "That is the whole way. Press “Write one token”, and it lights up, part by part, for the next one. A percentage " +
      "leads to the sum that it was computed by.",
  ],
];

class Tour {
  constructor(app) {
    this.app = app;
    this.at = 0;
    this.text = h("p", { role: "status" });
    this.back = button("Back", () => this.go(this.at - 1));
    this.on = button("Next", () => this.go(this.at + 1), { class: "main" });
    const buttons = h("div", { class: "controls" }, this.back, this.on, button("Leave", () => this.leave()));
    const attributes = { id: "tour", class: "missing drawn", "aria-label": "Tour", hidden: true };
    this.root = h("aside", attributes, this.text, buttons);
    this.root.addEventListener("keydown", ({ key }) => key === "Escape" && this.leave());
    element("page").prepend(this.root);
  }

  get stops() {
    const { app } = this;
    return STOPS.filter(([section]) => !app.lackOf(PANELS.find(({ id }) => id === section) ?? {}));
  }

  async go(i) {
    const { app, stops } = this;
    if (i === stops.length) return this.leave();
    await app.settled;
    const [section, selector, tell] = stops[i];
    this.at = i;
    app.goTo(section, { t: -1, key: -1, next: -1, number: null, ...this.sharpest() });
    const token = tokenName(app, app.at.t);
    this.text.textContent = `${i + 1} of ${stops.length}: ${tell(app, token)}`;
    this.back.disabled = !i;
    this.on.textContent = i + 1 === stops.length ? "Done" : "Next";
    this.root.hidden = false;
    this.on.focus({ preventScroll: true });
    await frames(4); // until the page has scrolled
    if (this.at === i && !this.root.hidden) this.point(selector); // unless the reader has gone on or left
  }

  /** The layer and the head in which the last token reads most from one before it, so that there is something to see. */
  sharpest() {
    const { config, stack, trace } = this.app;
    const t = trace.idx.length - 1;
    const weights = (layer) => lookUp(trace, `${stack}.blocks.${layer}.attn`).weights;
    const headsOf = (_, layer) =>
      weights(layer).map((rows, head) => ({ layer, head, most: largest(rows[t].subarray(0, t)) }));
    const heads = Array.from({ length: config.n_layer }, headsOf).flat();
    const { layer, head } = heads.reduce((a, b) => (b.most > a.most ? b : a));
    return { layer, head };
  }

  /** Outline this place, and no other. null: none. */
  point(selector) {
    document.querySelector(".toured")?.classList.remove("toured");
    const place = selector && document.querySelector(selector);
    place?.classList.add("toured");
    place?.scrollIntoView({ block: "center" });
  }

  leave() {
    this.root.hidden = true;
    this.point(null);
    element("text").focus({ preventScroll: true });
  }
}
