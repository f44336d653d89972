// Building blocks of the page. Texts from llamaslot become text nodes only, never markup.

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, '');
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const at = (id) => document.getElementById(id);

export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Give ``parent`` one child for each item, in their order. A child with the same key is kept, with its focus.
export function keyed(parent, items, keyOf, make, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let next = parent.firstElementChild;
  for (const item of items) {
    const key = String(keyOf(item));
    let child = known.get(key);
    if (child) known.delete(key);
    else {
      child = make(item);
      child.dataset.key = key;
    }
    update(child, item);
    if (child === next) next = next.nextElementSibling;
    else parent.insertBefore(child, next);
  }
  for (const child of known.values()) child.remove();
}

// Ask a question in a dialog. Resolves to true if the user confirms it, else to false.
export function confirmed(question, yes) {
  const dialog = at('ask');
  say(at('ask-text'), question);
  say(at('ask-yes'), yes);
  return new Promise((resolve) => {
    const end = (answer) => () => { dialog.close(); resolve(answer); };
    at('ask-yes').onclick = end(true);
    at('ask-no').onclick = end(false);
    dialog.oncancel = () => resolve(false);
    dialog.showModal();
    at('ask-no').focus();
  });
}
