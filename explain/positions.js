/* The section on positional encodings. */

function positionsPanel(app) {
  const scheme = app.config.position;
  const none = "This run has no positional encoding. Beside the config below are others, with sinusoids and rotations.";
  return [
    scheme === "none" ? missingNote(none, "article/08_positions/2-learned.py") : h("p", {}, POSITION_TEXTS[scheme]),
    POSITION_PARTS[scheme]?.(app),
  ];
}

const POSITION_TEXTS = {
  learned: "Each position has a trained vector, which is added to the token's.",
  sinusoidal: "Each position has a fixed vector of sinusoids, fast ones first, which is added to the token's.",
  rotary:
    "Each pair of features of a query or key is rotated by an angle that grows with its position: in their " +
    "product the position counts only through the distance. Each dial is a pair; its hand points to the angle " +
    "between query and key.",
  alibi: "Each head lowers a score by its slope times the distance.",
};

function positionHeat(app) {
  const path = `${app.stack}.position.vectors`;
  const heat = new Strip({
    label: "all positions, one a row",
    square: 5,
    columns: app.config.n_embd,
    describe: (i) => `position ${Math.floor(i / app.config.n_embd)}, feature ${i % app.config.n_embd}`,
    onSelect: (i) => app.open(`${path}:${Math.floor(i / app.config.n_embd)},${i % app.config.n_embd}`),
  });
  const update = () => {
    const i = app.selectedIn(path, app.at.t);
    const selected = i < 0 ? -1 : app.at.t * app.config.n_embd + i;
    heat.show(lookUp(app.trace, path).flatMap((row) => [...row]), { selected });
  };
  return [rowStrip(app, "vector of this position", () => path), { root: heat.root, update }];
}

function dials(app) {
  let distance = 5; // at this distance the first dials have turned, and the last ones hardly
  const hands = h("div", { role: "img", class: "dials" });
  const text = h("p", {});
  const limits = { min: 0, max: app.config.block_size - 1, step: 1, value: distance };
  const control = slider("Distance", limits, (d) => {
    distance = d;
    update();
  });
  const update = () => {
    const { t } = app.at;
    const apart = Math.min(distance, t);
    control.set(apart, Math.max(t, 1));
    const { frequency } = lookUp(app.trace, app.stack).position;
    const angles = Array.from(frequency, (f) => f * apart);
    text.textContent =
      `Query ${t}, key ${t - apart}: ${counted(apart, "position")} apart. The first pair is rotated by ` +
      `${digits(angles[0])} radians, the last by ${digits(angles.at(-1))}.`;
    hands.setAttribute("aria-label", text.textContent);
    hands.replaceChildren(...angles.map((angle) => h("span", { style: `rotate: ${-angle}rad` })));
  };
  const both = ["q", "k"].map((name) =>
    rowStrip(app, `${name === "q" ? "query" : "key"}, rotated`, () => blockPath(app, `attn.${name}`)),
  );
  return [controlRow(control), group("drawn", { root: hands, update }, text), both];
}

function slopes(app) {
  const rows = () =>
    Array.from(lookUp(app.trace, app.stack).position.slopes, (slope, i) => [
      `${i + 1}`,
      digits(slope),
      digits(-slope * Math.max(app.at.t - app.at.key, 0)),
    ]);
  return drawn(() => table("Slopes", ["head", "slope", "at this distance"], rows(), [0, 1, 2]));
}

const POSITION_PARTS = { learned: positionHeat, sinusoidal: positionHeat, rotary: dials, alibi: slopes };
