/* Elements, for the page of a run and that of serve.py. */

/** Make an element. attributes: as in HTML; on...: listeners; children: elements, texts, or nothing. */
function h(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name.startsWith("aria-"))
      made.setAttribute(name, value); // also if it is false
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

function button(label, onPress, attributes = {}) {
  return h("button", { type: "button", onclick: onPress, ...attributes }, label);
}

/** Make the items of an element one tab stop, among which the arrow keys walk.

entry(): the item that Tab enters; across: the number of items in a row. Call the result when items are added. */
function walkable(root, { items = "button", entry = () => root.querySelector(items), across = 1 } = {}) {
  const stopAt = (stop) => {
    for (const item of root.querySelectorAll(items)) item.tabIndex = item === stop ? 0 : -1;
  };
  root.addEventListener("focusin", ({ target }) => stopAt(target));
  root.addEventListener("focusout", () => stopAt(entry()));
  root.addEventListener("keydown", (event) => {
    const all = [...root.querySelectorAll(items)].filter((item) => item.checkVisibility());
    const at = all.indexOf(event.target);
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - across, ArrowDown: at + across };
    const to = { ...moves, Home: 0, End: all.length - 1 }[event.key];
    if (!all[to] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    all[to].focus();
  });
  return () => root.contains(document.activeElement) || stopAt(entry());
}

function scrollToEnd(scrolling) {
  scrolling.scrollTop = scrolling.scrollHeight;
}

function percent(p) {
  return p > 0 && p < 0.00005 ? "<0.01 %" : `${(100 * p).toFixed(p < 0.1 ? 2 : 1)} %`;
}
