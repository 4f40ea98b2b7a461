/* The list of the sections, in the article's order and at its end how the model came to be; and the sections on the whole
models.

Each has id, title and intro; needs: keys of NEEDS; alone: true if it needs no text; build(app): its parts: elements,
and {root, update()}, which draws root for the text and the selection of now; also lists of parts, and nothing. */

function gptPanel(app) {
  const branches = branchesOf(app.trace, ownBlock(app)).map((branch) => BRANCH_NAMES[branch]);
  const text =
    `The embedding; ${counted(app.config.n_layer, "layer")}, each a block of ${branches.join(" and ")}; ` +
    `${app.config.block === "post_norm" ? "" : "a final norm; "}and the output head, whose sums are the logits. A ` +
    `row of the table is what the model would predict if the stream ended after this part: the logit lens.`;
  return [
    h("p", {}, text),
    drawn(() => lensTable(app)),
    controlRow(layerPicker(app)),
    rowStrip(app, "stream after this layer", () => blockPath(app, "output")),
    rowStrip(app, "what the output head reads", () => "output"),
    rowStrip(app, "logits", () => "logits", { unit: "id" }),
  ];
}

function lensTable(app) {
  const V = app.model.tokenizer_vocab_size;
  const guess = (probs, id) => {
    const attributes = { class: "lens", style: tint(probs[id], 1) };
    return h("span", attributes, h("code", {}, shown(app.tokenizer, id)), ` ${percent(probs[id])}`);
  };
  const rows = logitLens(app.model, app.trace, app.stack, app.at.t).map(({ label, logits }) => {
    const probs = probabilities(app.model, logits);
    const best = likeliest(probs, Math.min(4, V));
    return [label, ...best.map((id) => guess(probs, id)), percent(probs[app.at.next])];
  });
  const heads = ["after", "1st", "2nd", "3rd", "4th", `“${shown(app.tokenizer, app.at.next)}”`];
  return table(`Logit lens for the token after ${tokenName(app, app.at.t)}`, heads, rows, [5]);
}

function transformerPanel(app) {
  const sourceRow = (label, rest) =>
    rowStrip(app, label, () => `source.encoder.blocks.${app.at.layer}.${rest}`, {
      token: () => Math.min(app.at.key, app.source.length - 1),
    });
  const alignmentLabel = "alignment: each row is a token of the translation, each column one of the source";
  const encoderLabel = "encoder: each row is a source token, and attends to all";
  return [
    sentence(
      () =>
        `The encoder has read the ${app.source.length} tokens of the source once; each token of it attends to ` +
        `all. The decoder writes step by step: token ${app.at.t}, ${tokenName(app, app.at.t)}, attends to the ` +
        `tokens before it and, in cross-attention, to the source.`,
    ),
    headGrid(app, "cross_attn"),
    controlRow(layerPicker(app), headPicker(app)),
    attentionMatrix(app, "cross_attn", { label: alignmentLabel }),
    attentionMatrix(app, "attn", { label: encoderLabel, encoder: true }),
    sourceRow("encoder, this layer: the selected source token", "output"),
    rowStrip(app, "decoder: what cross-attention adds", () => blockPath(app, "cross_attn.o_proj")),
  ];
}

// --------------------------------------------------------------------------------------
// The list

/** Whether the page can train by these settings of a run, which are null if its data is no text. */
const knowsRules = (training) => training?.optimizer in OPTIMIZERS && training.schedule in SCHEDULES;

/** What sections need: whether a run has it, why this one has not, and a config whose run has. */
const NEEDS = {
  stack: [
    (app) => app.stack,
    "This run is a window network: it has no attention, blocks or norms.",
    "humpty_dumpty.py",
  ],
  subwords: [
    (app) => !/^(char|byte)$/.test(app.tokenizer.name),
    "This run's tokens are single characters or bytes.",
    "article/02_subwords/2-subwords-same-text.py",
  ],
  mlp: [(app) => app.config.mlp !== "none", "This run's blocks have no MLP.", "article/04_residual/2-with.py"],
  norms: [(app) => app.config.norm !== "none", "This run has no norms.", "article/05_norm/2-with.py"],
  heads: [(app) => app.config.n_head > 1, "This run has one head.", "article/07_heads/2-four.py"],
  encoder: [(app) => app.encodes, "This run has no encoder and decoder.", "translate_de_en.py"],
  snapshots: [
    (app) => app.data.steps.length > 1 || app.playground.config,
    "This page has no earlier weights of its model.",
    "humpty_dumpty.py --snapshots=True",
  ],
  training: [
    (app) => app.config.model === "gpt" && knowsRules(app.data.training),
    "This page trains only models with model=gpt, on text, by the optimizers and schedules that HumptyGPT came with.",
    "humpty_dumpty.py",
  ],
};

const PANELS = [
  {
    id: "leaf",
    alone: true,
    title: "A toy first: leaf or flower",
    short: "Toy",
    chapter: "A simple neural network",
    build: leafPanel,
    intro:
      "Not your model yet: this is the network that the article “Understanding LLMs from Scratch Using Middle School " +
      "Math” begins with. It tells leaves from flowers by four numbers, and can be seen whole; your model consists " +
      "of the same sums, only of many more. A neuron is the sum of the numbers in the layer before it, each times " +
      "the weight on its line: select one. Bias adds a number to each sum. ReLU makes negative sums in the middle 0.",
  },
  {
    id: "training",
    alone: true,
    title: "Training",
    chapter: "How are these models trained?",
    build: (app) => [new LeafTraining().root, runLoss(app)],
    intro:
      "How the toy gets its weights. Its loss is how wrong it is: −ln of the probability of the right answer, on " +
      "average (a section below is about softmax, which makes the probabilities). Gradient descent changes each " +
      "weight a little, in the direction in which the loss falls.",
  },
  {
    id: "writing",
    title: "Writing",
    chapter: "How does all this help generate language?",
    build: writingPanel,
    intro: "From here on, your model. It predicts the next token, appends it to the text, and predicts again.",
  },
  {
    id: "embeddings",
    title: "Embeddings",
    chapter: "Embeddings",
    build: embeddingsPanel,
    intro: "To the model a token is a list of numbers: its embedding, a vector of features, trained with the rest.",
  },
  {
    id: "subwords",
    title: "Sub-words",
    build: subwordsPanel,
    needs: ["subwords"],
    intro: "Frequent sequences of characters are tokens of their own.",
  },
  {
    id: "attention",
    title: "Self-attention",
    short: "Attention",
    chapter: "Self Attention",
    build: attentionPanel,
    needs: ["stack"],
    intro:
      "Each token makes three vectors by projections, which are sums with trained weights: a query, what it looks " +
      "for; a key, what it has; a value, what it passes on. A query is multiplied with the key of each token up to " +
      "its own. By softmax, the next section, these scores become weights that add up to 1, by which the values are " +
      "mixed. A model does this in each of its layers, one after the other, and in one or more heads at once.",
  },
  {
    id: "softmax",
    title: "Softmax",
    chapter: "Softmax",
    build: softmaxPanel,
    intro:
      "At the end each token that the model knows has a score, its logit. It becomes a probability: exp(logit), " +
      "divided by the sum of all of these. Then one token is drawn.",
  },
  {
    id: "residual",
    title: "Residual connections",
    short: "Residual",
    chapter: "Residual connections",
    build: residualPanel,
    needs: ["stack"],
    intro:
      "Here a layer is a block of branches: attention, and a small network, the MLP of the next section. Each adds " +
      "its output to the residual stream, the vector of a token on its way through the model.",
  },
  {
    id: "mlp",
    title: "The MLP",
    short: "MLP",
    build: mlpPanel,
    needs: ["stack", "mlp"],
    intro:
      "In each layer, after attention has gathered, a small network like the toy, a multi-layer perceptron (MLP), " +
      "works on each token by itself.",
  },
  {
    id: "norm",
    title: "Layer normalization",
    short: "Norm",
    chapter: "Layer Normalization",
    build: normPanel,
    needs: ["stack", "norms"],
    intro: "Before a branch reads the stream, its features are brought to one scale.",
  },
  {
    id: "dropout",
    title: "Dropout",
    chapter: "Dropout",
    build: dropoutPanel,
    intro: "In training each activation is zeroed with a probability, so each step trains another, thinned network.",
  },
  {
    id: "heads",
    title: "Multi-head attention",
    short: "Heads",
    chapter: "Multi-head Attention",
    build: headsPanel,
    needs: ["stack", "heads"],
    intro: "Several heads attend at once, each to something else.",
  },
  {
    id: "positions",
    title: "Positions",
    chapter: "Positional encoding and embedding",
    build: positionsPanel,
    needs: ["stack"],
    intro: "But for its causal mask, which hides later tokens, attention alone does not see the order of the tokens.",
  },
  {
    id: "gpt",
    title: "The GPT",
    short: "GPT",
    chapter: "The GPT architecture",
    build: gptPanel,
    needs: ["stack"],
    intro: "The parts, assembled.",
  },
  {
    id: "transformer",
    title: "The transformer",
    short: "Transformer",
    build: transformerPanel,
    needs: ["encoder"],
    intro: "The original one, made for translation, has an encoder, which reads, and a decoder, which writes.",
  },
  {
    id: "learned",
    title: "It learned this",
    short: "Learned",
    build: learnedPanel,
    needs: ["snapshots"],
    intro: "Your model as it was after each of these steps of its training, for the same text, from noise to now.",
  },
  {
    id: "step",
    title: "One step of training",
    short: "One step",
    build: stepPanel,
    needs: ["training"],
    intro:
      "What a step of training on this text alone would change. The optimizer is the rule by which the gradient moves " +
      "the weights. At the top of this page the model takes such steps.",
  },
];
