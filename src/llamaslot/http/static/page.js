// The page: connects, keeps the state that llamaslot streams, and draws what has changed.

import { at, confirmed, el, keyed, say } from './parts.js';
import { Refused, key, post, watch } from './server.js';
import * as activity from './activity.js';
import * as outages from './outages.js';
import * as plots from './plots.js';
import * as store from './store.js';
import { bytes, clock, day, elapsed, modelName, number, percent, person, seconds, short } from './words.js';

const state = new Map();
let ahead = 0; // seconds that the clock of llamaslot's machine is ahead of ours
const now = () => Date.now() / 1000 + ahead;

// -- the stream --------------------------------------------------------------------------------------------------

const SILENT_MS = 45_000; // llamaslot says something every 15 s: a connection that brings less was lost, as over a night

let stream = null;
let isTold = false; // the state is that of now
let isRefused = false; // it waits for a key
let heardAt = 0;

async function connect() {
  for (let pause = 1; stream === null; pause = Math.min(pause * 2, 10)) {
    const its = new AbortController();
    stream = its;
    heardAt = Date.now();
    try {
      await watch((name, changes) => { pause = 1; took(name, changes); }, () => { heardAt = Date.now(); }, its.signal);
    } catch (error) {
      if (stream === its && error instanceof Refused && (error.status === 401 || error.status === 403)) {
        stream = null;
        return refused(error);
      }
    }
    if (stream !== its) return; // the tab was hidden
    stream = null;
    if (isTold) cutOff();
    isTold = false;
    await new Promise((resolve) => setTimeout(resolve, pause * 1000));
  }
}

function took(name, changes) {
  isTold = true;
  if (name === 'all') {
    state.clear();
    ahead = changes.now - Date.now() / 1000;
    delete changes.now;
    at('login').hidden = at('notice').hidden = true;
    at('content').hidden = false;
    at('content').classList.remove('old');
    activity.refresh();
    plots.refresh();
  }
  for (const [what, value] of Object.entries(changes)) {
    if (value === null) state.delete(what);
    else state.set(what, value);
  }
  if (name !== 'all' && changes.ended) activity.add(changes.ended);
  draw(name === 'all' ? null : new Set(Object.keys(changes).map((what) => what.split(':')[0])));
}

// Say that what is shown is old.
function cutOff() {
  connection('lost', `no connection since ${clock(now())}, trying again`);
  say(at('notice'), `llamaslot does not answer since ${clock(now())}. The page shows what was then, and goes on by itself when llamaslot is back.`);
  at('notice').hidden = false;
  at('content').classList.add('old');
}

function connection(kind, text) {
  at('connection').className = kind;
  say(at('connection'), text);
}

function refused(error) {
  isTold = false;
  isRefused = true;
  at('content').hidden = true;
  connection('lost', 'not connected');
  if (error.status === 403 && !key.get()) {
    say(at('notice'), error.message);
    at('notice').hidden = false;
    return;
  }
  say(at('login-error'), key.get() ? error.message : '');
  key.forget();
  at('login').hidden = false;
  at('key').focus();
}

at('login').addEventListener('submit', (event) => {
  event.preventDefault();
  key.set(at('key').value.trim());
  at('key').value = '';
  isRefused = false;
  connect();
});

// A hidden tab closes its stream of events.
document.addEventListener('visibilitychange', () => {
  if (document.hidden) {
    stream?.abort();
    stream = null;
  } else if (!isRefused) connect();
});

// -- drawing -----------------------------------------------------------------------------------------------------

const all = (prefix) => [...state].filter(([what]) => what.startsWith(prefix)).map(([what, value]) => ({ ...value, key: what.slice(prefix.length) }));

// Draw the parts of the state whose keys have changed. ``kinds``: the beginnings of these keys; null for all.
function draw(kinds) {
  const has = (kind) => kinds === null || kinds.has(kind);
  if (has('headline') || has('store')) headline();
  if (has('store')) store.refresh();
  if (has('backend')) backends();
  if (has('flight')) flights();
  if (has('backend') || has('ended')) outages.draw(all('backend:'), now());
  const { version, queue } = state.get('about');
  say(at('about'), `llamaslot ${version}`);
  const n = all('flight:').length;
  const waiting = queue ? `, ${number(queue)} waiting for a slot` : '';
  say(at('flight-sum'), n ? `${number(n)} request${n === 1 ? '' : 's'}${waiting}` : '');
}

function headline() {
  const { today, ever, midnight, is_kept: isKept } = state.get('headline');
  const { began } = state.get('about');
  const { n, size_bytes: size, quota_bytes: quota } = state.get('store');
  const range = (sums) => (sums.saved_error_s / (sums.saved_s || 1) >= 0.01 ? ` ± ${seconds(sums.saved_error_s)}` : '');
  const tiles = [
    ['Prefill time saved today', seconds(today.saved_s), range(today).trim(),
      `what the reused tokens would have taken; ${began < midnight ? `${seconds(ever.saved_s)}${range(ever)} since ${day(began)}; ` : ''}saves and restores took ${seconds(today.moved_s)}`],
    ['Prompt tokens reused', percent(today.share_reused), 'today',
      `${short(today.n_reused)} reused, ${short(today.n_computed)} computed`],
    ['Time to first token', seconds(today.first_p50_s), 'or less for half', `${seconds(today.first_p95_s)} or less for 95 of 100`],
    ['Failed because of llamaslot', number(today.n_faults), `of ${number(today.n)} requests today`,
      today.n_unserved ? `${number(today.n_unserved)} not served: llama-server was away, or the wait too long` : 'and all others were served'],
    ['Snapshots on disk', bytes(size), quota ? `of ${bytes(quota)}` : '', `${number(n)} ${n === 1 ? 'snapshot' : 'snapshots'}`],
  ];
  keyed(at('headline'), tiles, ([name]) => name,
    ([name]) => el('div', { class: 'tile' }, el('h2', {}, name), el('p', { class: 'big' }), el('p', { class: 'of' }), el('p', {})),
    (tile, [, big, of, more]) => {
      say(tile.children[1], big);
      say(tile.children[2], of);
      say(tile.children[3], more);
    });
  at('about').title = isKept ? '' : 'The history is not kept over restarts: see the log';
}

let models = ''; // by whose names snapshots are listed

const DOES = { answering: 'answers', 'reading the prompt': 'reads' };

function backends() {
  const every = all('backend:');
  const slots = every.flatMap((backend) => backend.slots);
  const nBusy = slots.filter((slot) => slot.state === 'LEASED').length;
  at('slots').querySelector('.legend').hidden = !slots.length;
  say(at('slots-sum'), slots.length ? `${nBusy} of ${slots.length} busy` : '');
  const names = every.map((its) => its.model).join(' ');
  if (names !== models) store.refresh();
  models = names;
  const down = every.filter((its) => its.health === 'down').map((its) => its.name);
  const up = every.length === 1 ? `${every[0].name} is ${every[0].health}` : `${every.length - down.length} of ${every.length} backends up`;
  connection(down.length ? 'lost' : 'live', down.length ? `${down.join(' and ')} ${down.length > 1 ? 'are' : 'is'} down` : `live, ${up}`);
  keyed(at('backends'), every, (its) => its.key,
    (its) => el('div', { class: 'backend' }, el('h3', {}, el('span', {}), ' ', el('small', {})), el('p', { class: 'warning', hidden: true }), el('ol', {})),
    (node, its) => {
      const [title, warning, list] = node.children;
      say(title.children[0], its.name);
      const facts = [its.health === 'up' ? modelName(its.model ?? '') : its.health, its.n_ctx && its.health === 'up' ? `${number(its.n_ctx)} tokens per slot` : null, its.drain,
        its.outage?.ended ? `up since ${clock(its.outage.ended)}` : null];
      say(title.children[1], facts.filter(Boolean).join(' · '));
      node.classList.toggle('down', its.health !== 'up');
      const aside = its.assist && !its.assist.is_on ? `llama-server chooses the slots: ${its.assist.why}. ${its.assist.remedy ?? ''}` : '';
      const told = [aside, ...its.warnings].filter(Boolean).join(' — ');
      warning.hidden = !told;
      say(warning, told);
      keyed(list, its.slots, (slot) => slot.id, makeSlot, (row, slot) => updateSlot(row, slot, its));
    });
}

const makeSlot = () => el('li', { class: 'slot' }, el('span', { class: 'id' }), el('span', { class: 'who' }), el('span', { class: 'bar', 'aria-hidden': 'true' }, el('i', {}), el('b', {})), el('span', { class: 'n' }), el('span', { class: 'does' }));

function updateSlot(row, slot, backend) {
  const [id, who, bar, tokens, does] = row.children;
  const isBusy = slot.does !== null;
  const n = slot.prefill ? slot.prefill.n_done : slot.n_tokens;
  const share = (x) => `${Math.min(100, (100 * x) / (backend.n_ctx || 1)).toFixed(2)}%`;
  say(id, String(slot.id));
  const past = slot.n_tokens ? (slot.last_user ? person(slot.last_user) : 'unknown') : '';
  say(who, isBusy ? person(slot.user) : past);
  who.classList.toggle('past', !isBusy);
  who.title = slot.user ?? slot.last_user ?? '';
  bar.children[0].style.width = share(slot.prefill ? slot.prefill.n_tokens : 0);
  bar.children[1].style.width = share(n);
  bar.children[1].className = isBusy ? DOES[slot.does] ?? 'waits' : 'held';
  say(tokens, slot.prefill ? `${number(n)} of ${number(slot.prefill.n_tokens)}` : n ? number(n) : '');
  let text = slot.does;
  if (!isBusy) {
    const used = slot.used_at ? `used ${seconds(now() - slot.used_at)} ago` : '';
    const kept = slot.snapshot && !slot.is_dirty ? 'also on disk' : slot.is_dirty ? 'not on disk' : '';
    text = slot.state === 'FREE' ? 'free' : slot.state === 'SUSPECT' ? 'content unknown: erased before use' : [used, kept].filter(Boolean).join(', ');
  } else if (slot.state === 'ABANDONED') text = 'client left, finishing';
  say(does, text);
}

function flights() {
  const rank = (its) => (its.backend ? 0 : its.position ?? 1e6); // in a slot, then as they will get one
  const every = all('flight:').sort((a, b) => rank(a) - rank(b) || a.at - b.at);
  at('no-flights').hidden = every.length > 0;
  at('flights').closest('.scroll').hidden = every.length === 0;
  at('flights').parentElement.classList.toggle('one-model', new Set(every.map((its) => its.model)).size < 2);
  keyed(at('flights'), every, (its) => its.key, makeFlight, updateFlight);
}

function makeFlight(its) {
  const cell = (label, kind) => el('td', { 'data-label': label, class: kind });
  return el('tr', {}, cell('Elapsed', 'n'), cell('User', 'user'), cell('Stage', 'wide'), cell('Speed', 'n'), cell('Where'), cell('Model', 'cut model'), cell('Client', 'cut'),
    el('td', {}, el('button', { type: 'button', class: 'small', 'aria-label': `Cancel the request of ${person(its.user)}`, onclick: (event) => cancel(event.target.closest('tr')) }, 'Cancel')));
}

function updateFlight(row, its) {
  row.its = its;
  const [, who, stage, speed, where, model, client] = row.children;
  tick(row);
  say(who, person(its.user));
  who.title = its.user;
  say(stage, its.gives_way_to ? `${its.stage}, gives way to ${its.gives_way_to}` : its.stage + (its.n_answered ? `, ${number(its.n_answered)} token${its.n_answered === 1 ? '' : 's'}` : ''));
  say(speed, its.tokens_per_s ? `${short(its.tokens_per_s)}/s` : '');
  say(where, its.backend ? `${its.backend}${its.slot == null ? '' : ` / ${its.slot}`}` : '');
  say(model, modelName(its.model));
  say(client, its.client.split(' ')[0]);
  model.title = its.model;
  client.title = its.client;
}

const tick = (row) => say(row.children[0], elapsed(now() - row.its.at));

setInterval(() => {
  if (stream && Date.now() - heardAt > SILENT_MS) stream.abort();
  if (document.hidden || !isTold) return;
  for (const row of at('flights').children) tick(row);
  if (!state.size) return;
  backends();
  outages.draw(all('backend:'), now());
}, 1000);

async function cancel(row) {
  const { its } = row;
  if (!await confirmed(`Cancel the request of ${person(its.user)} (${its.stage})? Its client gets an error.`, 'Cancel the request')) return;
  try {
    await post('cancel', { request: its.id });
  } catch (error) {
    if (error.status === 404) return; // it has ended by itself
    say(at('notice'), error.message);
    at('notice').hidden = false;
  }
}

activity.start(now);
store.start(now);
plots.start();
connect();
