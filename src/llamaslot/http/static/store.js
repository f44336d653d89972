// The picture of the disk: snapshots side by side, as wide as their bytes, below the prefix that they share.

import { at, confirmed, el, keyed, say } from './parts.js';
import { get, post } from './server.js';
import { bytes, modelName, number, person, seconds } from './words.js';

const LEVELS = 7;
const HEIGHT = 36;
const LEAST = 0.25; // percent of the width; thinner ones are drawn together
const ALIKE = 64; // tokens
const USERS = 12; // listed by name
const NEXT = 5; // those that are evicted first
const PAUSE_MS = 4000;
const SPREAD_MS = 1000; // a random delay, so that many pages do not ask at the same moment

let tree = null;
let chosenKey = null;
let asked = 0;
let timer = null;
let now = () => Date.now() / 1000;

export function refresh() {
  if (timer !== null) return;
  timer = setTimeout(load, asked ? Math.max(asked + PAUSE_MS - Date.now(), 0) + Math.random() * SPREAD_MS : 0);
}

async function load() {
  const query = asked ? { max_age_s: PAUSE_MS / 1000 } : {};
  asked = Date.now();
  try {
    const told = await get('snapshots', query);
    timer = null;
    tree = treeOf(told.snapshots);
    const rest = told.n > told.snapshots.length ? `, the ${number(told.snapshots.length)} largest are shown` : '';
    say(at('store-sum'), `${bytes(told.size_bytes)}${told.quota_bytes ? ` of ${bytes(told.quota_bytes)}` : ''}${told.n ? ` in ${number(told.n)} snapshot${told.n === 1 ? '' : 's'}` : ''}${rest}`);
    at('no-snapshots').hidden = told.n > 0;
    at('shades').hidden = told.n === 0;
    draw();
    fillers(told.snapshots);
    next(told.snapshots, told.quota_bytes ? told.quota_bytes - told.size_bytes : null);
  } catch {
    timer = null;
  }
}

// Make the tree of prefixes. Rows with the same beginning are neighbours; ``n_common`` is its number of tokens.
export function treeOf(rows) {
  const root = { key: 'all', depth: 0, children: [], level: 'all' };
  order(rows);
  for (const [model, its] of Map.groupBy(rows, (row) => row.model)) {
    const top = { key: `model ${model}`, depth: 0, children: [], level: 'model', name: its[0].model_name ? modelName(its[0].model_name) : `model ${model}`, isServed: its[0].is_served };
    const path = [top];
    for (const row of its) {
      const common = row.n_common >= ALIKE ? row.n_common : 0;
      let last = null;
      while (path.at(-1).depth > common) last = path.pop();
      if (last && path.at(-1).depth < common) {
        const parent = path.at(-1);
        const group = { key: `alike ${last.key}`, depth: common, children: [last], level: 'alike' };
        parent.children[parent.children.indexOf(last)] = group;
        path.push(group);
      }
      const leaf = { key: row.id, depth: row.n_tokens, children: [], level: 'snapshot', row };
      path.at(-1).children.push(leaf);
      path.push(leaf);
    }
    root.children.push(top);
  }
  weigh(root);
  return root;
}

// Put snapshots into the order in which they are evicted: those of other models first, then by value. ``place`` is 1 for
// the first, null for what stays.
function order(rows) {
  const stays = (row) => row.is_pinned && row.is_served;
  const goes = rows.filter((row) => !stays(row)).sort((a, b) => a.is_served - b.is_served || a.value - b.value || a.last_used - b.last_used);
  for (const row of rows) Object.assign(row, { place: null, rank: 1 });
  goes.forEach((row, i) => Object.assign(row, { place: i + 1, rank: (i + 1) / rows.length }));
}

const sum = (list, of) => list.reduce((all, its) => all + of(its), 0);

// The bytes of a snapshot: its own, and its share of the files that other snapshots need too.
const held = (row) => row.size_bytes + row.share_bytes;

function weigh(node) {
  node.own = node.row ? held(node.row) : 0;
  node.n = node.row ? 1 : 0;
  node.bytes = node.own;
  node.used = node.row?.last_used ?? 0;
  node.hits = node.row?.n_hits ?? 0;
  node.rank = node.row?.rank ?? 0;
  for (const child of node.children) {
    weigh(child);
    node.bytes += child.bytes;
    node.n += child.n;
    node.used = Math.max(node.used, child.used);
    node.hits += child.hits;
    node.rank = Math.max(node.rank, child.rank);
  }
  node.children.sort((a, b) => b.bytes - a.bytes);
}

const times = (n) => (n === 0 ? 'never' : n === 1 ? 'once' : `${number(n)} times`);
const ownerOf = (row) => (row.kind === 'trunk' ? 'shared beginning' : row.user ? person(row.user) : 'conversation');
const ageOf = (node) => Math.max(now() - node.used, 0);

function label(node) {
  switch (node.level) {
    case 'model': return `${node.name}${node.isServed ? '' : ' (not served now)'}: ${bytes(node.bytes)}`;
    case 'alike': return `the same first ${number(node.depth)} tokens: ${node.n} snapshots, ${bytes(node.bytes)}`;
    case 'rest': return `${node.n} small one${node.n === 1 ? '' : 's'}, ${bytes(node.bytes)}`;
    default: {
      return `${node.row.is_pinned ? 'pinned, ' : ''}${ownerOf(node.row)}: ${number(node.row.n_tokens)} tokens, ${bytes(node.own)}${node.n > 1 ? `; with all below it ${bytes(node.bytes)}` : ''}`;
    }
  }
}

function shade(node) {
  const strength = {
    age: () => Math.max(0, 1 - Math.log10(1 + ageOf(node) / 60) / 4),
    rank: () => node.rank,
    hits: () => Math.min(node.hits / 8, 1),
  }[at('shade').value]();
  return `${Math.round(8 + 40 * strength)}%`;
}

function draw() {
  const blocks = [];
  const place = (node, left, width, level) => {
    blocks.push({ node, left, width, level });
    if (level + 1 >= LEVELS) return;
    let x = left;
    const thin = { key: `rest ${node.key}`, level: 'rest', children: [], n: 0, bytes: 0, used: 0, hits: 0, rank: 0 };
    for (const child of node.children) {
      const its = (width * child.bytes) / (node.bytes || 1);
      if (its >= LEAST) {
        place(child, x, its, level + 1);
        x += its;
      } else {
        thin.n += child.n;
        thin.bytes += child.bytes;
        thin.used = Math.max(thin.used, child.used);
      }
    }
    if (thin.n) blocks.push({ node: thin, left: x, width: (width * thin.bytes) / (node.bytes || 1), level: level + 1 });
  };
  let x = 0;
  for (const model of tree.children) {
    const width = (100 * model.bytes) / (tree.bytes || 1);
    place(model, x, width, 0);
    x += width;
  }
  const icicle = at('icicle');
  icicle.hidden = blocks.length === 0;
  icicle.style.height = `${(Math.max(-1, ...blocks.map((block) => block.level)) + 1) * HEIGHT}px`;
  const isThere = blocks.some(({ node }) => node.key === chosenKey);
  keyed(icicle, blocks, ({ node }) => node.key,
    () => el('button', { type: 'button', onclick: (event) => choose(event.currentTarget) }),
    (button, { node, left, width, level }) => {
      button.node = node;
      button.level = level;
      button.className = node.level + (node.row?.is_pinned ? ' pinned' : '');
      Object.assign(button.style, { left: `${left}%`, width: `${width}%`, top: `${level * HEIGHT}px` });
      button.style.setProperty('--strength', shade(node));
      say(button, label(node));
      button.title = label(node);
      button.setAttribute('aria-pressed', String(node.key === chosenKey));
      button.tabIndex = node.key === chosenKey ? 0 : -1;
    });
  if (!isThere && icicle.firstElementChild) icicle.firstElementChild.tabIndex = 0;
  tell(blocks.find(({ node }) => node.key === chosenKey)?.node);
}

function choose(button) {
  chosenKey = button.node.key;
  draw();
}

function move(event) {
  const here = event.target.closest('button');
  const every = [...at('icicle').children];
  const middle = (button) => button.offsetLeft + button.offsetWidth / 2;
  const near = (list) => list.sort((a, b) => Math.abs(middle(a) - middle(here)) - Math.abs(middle(b) - middle(here)))[0];
  const found = {
    ArrowRight: () => near(every.filter((its) => its.level === here.level && its.offsetLeft > here.offsetLeft)),
    ArrowLeft: () => near(every.filter((its) => its.level === here.level && its.offsetLeft < here.offsetLeft)),
    ArrowUp: () => near(every.filter((its) => its.level === here.level - 1)),
    ArrowDown: () => near(every.filter((its) => its.level === here.level + 1)),
  }[event.key]?.();
  if (!found) return;
  event.preventDefault();
  found.focus();
}

function tell(node) {
  const panel = at('chosen');
  if (!node?.row) {
    panel.replaceChildren(...(node ? [el('p', {}, label(node))] : []));
    return;
  }
  const { row } = node;
  const facts = [
    ['Snapshot', row.id], ['User', row.kind === 'trunk' ? 'shared' : row.user ?? (row.namespace || 'not known any more')], ['Kind', row.kind === 'trunk' ? 'shared beginning of conversations' : 'conversation'],
    ['Tokens', number(row.n_tokens)], ['Size', bytes(held(row))], ['To delete it frees', bytes(row.size_bytes)], ['Saved', `${seconds(now() - row.created_at)} ago`], ['Used', `${seconds(now() - row.last_used)} ago`],
    ['Resumed', times(row.n_hits)], ['Evicted', row.place === null ? 'never: pinned' : row.place === 1 ? 'first of all' : `after ${number(row.place - 1)} others`], ['Saved by', row.request],
  ];
  panel.replaceChildren(
    el('dl', {}, ...facts.map(([name, value]) => el('div', {}, el('dt', {}, name), el('dd', {}, value)))),
    el('div', { class: 'tools' },
      el('button', { type: 'button', onclick: () => act(row.is_pinned ? 'unpin' : 'pin', row) }, row.is_pinned ? 'Unpin' : 'Pin: never evict it'),
      el('button', { type: 'button', class: 'danger', onclick: () => remove(row) }, 'Delete')));
}

async function remove(row) {
  if (await confirmed(`Delete this snapshot of ${number(row.n_tokens)} tokens? A conversation that comes back to it is computed again.`, 'Delete it')) await act('delete', row);
}

async function act(what, row) {
  try {
    await post(what, { snapshot: row.id });
  } catch (error) {
    at('chosen').append(el('p', { role: 'alert' }, error.message));
    return;
  }
  clearTimeout(timer);
  timer = null;
  asked = 0;
  refresh();
}

function fillers(rows) {
  const users = [...Map.groupBy(rows, (row) => (row.kind === 'trunk' ? ' ' : row.user ?? row.namespace ?? ''))].map(([user, its]) => ({ user, n: its.length, bytes: sum(its, held) }));
  users.sort((a, b) => b.bytes - a.bytes);
  const others = users.length > USERS + 1 ? users.splice(USERS) : [];
  if (others.length) users.push({ user: `${number(others.length)} others`, n: sum(others, (its) => its.n), bytes: sum(others, (its) => its.bytes) });
  const most = Math.max(...users.map((its) => its.bytes), 1);
  const line = ({ user, n, bytes: size }) => {
    const bar = el('b', {});
    bar.style.width = `${(100 * size) / most}%`;
    return el('li', {}, el('span', { title: user }, user === ' ' ? 'shared beginnings' : user ? person(user) : 'user not known'), el('span', { class: 'bar', 'aria-hidden': 'true' }, bar), el('span', { class: 'n' }, bytes(size)), el('span', { class: 'note' }, `${number(n)} snapshot${n === 1 ? '' : 's'}`));
  };
  at('fillers').replaceChildren(...(users.length ? [el('h3', {}, 'By user'), el('ol', { class: 'timeline' }, ...users.map(line))] : []));
}

// List what is evicted first. ``left``: bytes up to the quota; null without one.
function next(rows, left) {
  const first = rows.filter((row) => row.place !== null).sort((a, b) => a.place - b.place).slice(0, NEXT);
  const usual = sum(rows, held) / (rows.length || 1);
  const when = left === null ? 'when room is needed' : left > usual ? `when ${bytes(left)} more are full` : 'the disk is full: by the next saves';
  const why = (row) => (row.is_served ? `used ${seconds(now() - row.last_used)} ago, resumed ${times(row.n_hits)}` : 'its model is not served now');
  const line = (row) => el('li', {}, el('span', { title: row.id }, ownerOf(row)), el('span', { class: 'n' }, bytes(held(row))), el('span', { class: 'note' }, why(row)));
  at('next').replaceChildren(...(first.length ? [el('h3', {}, 'Evicted first ', el('small', {}, when)), el('ol', {}, ...first.map(line)), el('p', { class: 'none' }, 'What saves the least time per byte goes first.')] : []));
}

export function start(clockOfServer) {
  now = clockOfServer;
  at('shade').addEventListener('change', () => tree && draw());
  at('icicle').addEventListener('keydown', move);
}
