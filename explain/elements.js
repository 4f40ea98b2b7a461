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

function percent(p) {
  return p > 0 && p < 0.00005 ? "<0.01 %" : `${(100 * p).toFixed(p < 0.1 ? 2 : 1)} %`;
}
