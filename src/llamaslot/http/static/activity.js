// The last requests, and the timeline of one of them.

import { at, el, keyed, say } from './parts.js';
import { get } from './server.js';
import { OUTCOMES, clock, modelName, number, person, reason, seconds, short } from './words.js';

const STEP = 20; // rows shown at a time
const COPIED = 30;
const KEPT = 2000;

let rows = []; // newest first
let shown = STEP;
let busy = false;
let again = false;
let drawnOn = ''; // the day of the last drawing: rows of earlier days show their date too
const open = new Map(); // details by serial
let now = () => Date.now() / 1000;

// Fetch the requests that have ended since the newest row; all requests if llamaslot has another history now.
export async function refresh() {
  if (busy) {
    again = true;
    return;
  }
  busy = true;
  try {
    const last = rows[0]?.serial ?? 0;
    const { ended } = await get('activity', { n: KEPT, after: Math.max(last - 1, 0) });
    const isSame = last === 0 || ended.some((its) => its.serial === last && its.at === rows[0].at);
    rows = isSame ? [...ended.filter((its) => its.serial > last), ...rows].slice(0, KEPT) : (await get('activity', { n: KEPT })).ended;
    draw();
  } catch { /* the stream of events reports a lost connection */ } finally {
    busy = false;
    if (again) {
      again = false;
      refresh();
    }
  }
}

// Add the rows of requests that have just ended, newest first. If rows between the old and the new ones are missing,
// they are fetched.
export function add(ended) {
  const last = rows[0]?.serial ?? 0;
  const its = ended.filter(({ serial }) => serial > last);
  if (busy || (its.length && its.at(-1).serial > last + 1)) refresh();
  else if (its.length) {
    rows = [...its, ...rows].slice(0, KEPT);
    draw();
  }
}

const KINDS = {
  all: () => true,
  slow: (its) => (its.first_s ?? its.total_s) >= 5,
  cold: (its) => its.n_computed >= 1024 && its.n_computed > (its.n_reused ?? 0),
  bad: (its) => its.outcome !== 'done',
};

function chosen() {
  const words = at('filter').value.toLowerCase().split(/\s+/).filter(Boolean);
  const kind = KINDS[at('kind').value];
  return rows.filter((its) => {
    if (!kind(its)) return false;
    const text = [its.id, its.user, its.model, its.client, its.text, its.backend, OUTCOMES[its.outcome], its.error].join(' ').toLowerCase();
    return words.every((word) => text.includes(word));
  });
}

function draw() {
  const today = new Date().toDateString();
  if (drawnOn !== today) at('requests').replaceChildren();
  drawnOn = today;
  const found = chosen();
  say(at('activity-sum'), found.length === rows.length ? (rows.length ? `last ${number(rows.length)} request${rows.length === 1 ? '' : 's'}` : '') : `${number(found.length)} of the last ${number(rows.length)}`);
  at('no-requests').hidden = found.length > 0;
  say(at('no-requests'), rows.length ? 'No request matches.' : `No request yet. The base URL for clients is ${new URL('../v1', document.baseURI)}`);
  at('requests').closest('.scroll').hidden = found.length === 0;
  at('more').hidden = found.length <= shown;
  at('requests').parentElement.classList.toggle('one-model', new Set(rows.map((its) => its.model)).size < 2);
  const items = found.slice(0, shown).flatMap((its) => (open.has(its.serial) ? [{ its }, { its, detail: open.get(its.serial) }] : [{ its }]));
  keyed(at('requests'), items, ({ its, detail }) => `${its.serial}${detail ? ' detail' : ''}`,
    ({ its, detail }) => (detail ? details(detail) : makeRow(its)),
    (row, { its, detail }) => { if (!detail) row.querySelector('button').setAttribute('aria-expanded', open.has(its.serial)); });
}

// The seconds in which a request waited: in the queue, and for the turns of others once it had a slot.
const waitedS = (its) => its.queued_s + (its.waited_s ?? 0);
const speed = (n, s) => (n >= 8 && s > 0.001 ? short(n / s) : '–');
const speeds = (its) => (its.n_computed || its.n_answered ? `${speed(its.n_computed, its.prefill_s)} / ${speed(its.n_answered, its.decode_s)}` : '–');

const endOf = (its) => its.at + its.total_s;

// The number of requests that were not served and ended between two times, in seconds since 1970.
export const unserved = (from, to) => rows.filter((its) => its.outcome === 'unserved' && endOf(its) >= from && endOf(its) <= to).length;

// Why the request took as long as it did: the wait first, if that was most of the time to the first token.
function textOf(its) {
  if (its.outcome !== 'done') return [OUTCOMES[its.outcome], its.outcome === 'unserved' ? reason(its.error) || its.text : its.error || its.text].filter(Boolean).join(': ');
  if (!isMostlyWait(its)) return its.text;
  return `waited ${seconds(waitedS(its))} ${its.queued_s > (its.waited_s ?? 0) ? 'for a slot' : 'for its turn'}; ${its.text}`;
}

const isMostlyWait = (its) => waitedS(its) >= 1 && waitedS(its) > (its.first_s ?? its.total_s) / 2;

function makeRow(its) {
  const cell = (label, text, kind, title) => el('td', { 'data-label': label, class: kind, title }, text);
  const isBad = its.outcome !== 'done';
  const waited = waitedS(its);
  return el('tr', { class: isBad ? its.outcome : null, onclick: (event) => toggle(event, its) },
    el('td', { 'data-label': 'Ended' }, el('button', { type: 'button', class: 'time', 'aria-expanded': 'false', title: `Timeline of ${its.id}` }, clock(endOf(its)))),
    cell('User', person(its.user), 'user', its.user),
    cell('What happened', textOf(its), 'wide'),
    cell('Reused', its.n_reused == null ? '–' : number(its.n_reused), its.n_reused == null ? 'n nil' : 'n'),
    cell('Computed', number(its.n_computed), 'n'),
    cell('Answered', number(its.n_answered), 'n'),
    cell('Waited', waited >= 0.05 ? seconds(waited) : '–', isMostlyWait(its) ? 'n most' : waited >= 0.05 ? 'n' : 'n nil'),
    cell('First token', seconds(its.first_s), its.first_s == null ? 'n nil' : 'n'),
    cell('Prefill / answer tokens/s', speeds(its), speeds(its).includes('–') && its.first_s == null ? 'n nil' : 'n'),
    cell('Model', modelName(its.model), 'cut model', its.model));
}

async function toggle(event, its) {
  if (String(getSelection())) return; // text is being selected
  if (open.has(its.serial)) open.delete(its.serial);
  else {
    try {
      open.set(its.serial, { ...its, ...await get('activity', { request: its.id }), asked: its });
    } catch {
      open.set(its.serial, { ...its, stages: [], asked: its });
    }
  }
  draw();
}

const NAMES = { read: 'received', queue: 'in the queue', turn: 'waited its turn', save: 'saved the slot', keep: 'saved a shared beginning', restore: 'restored', erase: 'cleared the slot', prefill: 'prefill', prompt: 'prefill', answer: 'answer' };

function details(its) {
  const total = Math.max(its.total_s, 0.001);
  const hasPrefill = its.stages.some((stage) => stage.name === 'prefill');
  const nameOf = (stage) => (stage.name === 'prompt' && hasPrefill ? 'prefill, last part' : NAMES[stage.name] ?? stage.name);
  const lines = its.stages.filter((stage) => stage.seconds >= 0.0005).map((stage) => {
    const bar = el('i', { class: stage.is_done ? stage.name : 'failed' });
    bar.style.left = `${(100 * stage.begin_s) / total}%`;
    bar.style.width = `${Math.max((100 * stage.seconds) / total, 0.3)}%`;
    return el('li', {}, el('span', {}, nameOf(stage)), el('span', { class: 'bar', 'aria-hidden': 'true' }, bar), el('span', { class: 'n' }, seconds(stage.seconds)), el('span', { class: 'note' }, stage.note));
  });
  const facts = [
    ['Request', its.id], ['User', its.user], ['Client', its.client || '–'], ['Route', its.route], ['Status', String(its.status)],
    ['Where', its.backend ? `${its.backend}${its.slot == null ? '' : ` / slot ${its.slot}`}` : '–'],
    ['Came', clock(its.at)], ['Whole time', seconds(its.total_s)],
    ['Prefill saved', its.saved_s ? `${seconds(its.saved_s)} ± ${seconds(its.saved_error_s)}` : '–'],
    ['Error', its.error],
  ];
  const quoted = its.diverged?.text;
  return el('tr', { class: 'detail' }, el('td', { colspan: 10 },
    lines.length ? el('ol', { class: 'timeline', 'aria-label': `Timeline of ${its.id}` }, ...lines) : el('p', { class: 'none' }, 'Its steps are not known any more.'),
    quoted ? el('p', { class: 'quoted' }, 'After ', el('q', {}, quoted.before), ' now ', el('q', {}, quoted.now), ', earlier ', el('q', {}, quoted.earlier)) : null,
    el('dl', {}, ...facts.filter(([, value]) => value).map(([name, value]) => el('div', {}, el('dt', {}, name), el('dd', {}, value))))));
}

const cellOf = (text) => String(text).replaceAll(/[\r\n]+/g, ' ').replaceAll('|', '\\|');

export function asMarkdown(list) {
  const head = ['Ended', 'User', 'What happened', 'Reused', 'Computed', 'Answered', 'Waited', 'First token', 'Model'];
  const lines = list.map((its) => [
    clock(endOf(its)), person(its.user), textOf(its),
    its.n_reused == null ? '–' : number(its.n_reused), number(its.n_computed), number(its.n_answered), seconds(waitedS(its)), seconds(its.first_s), modelName(its.model)]);
  return [head, head.map(() => '---'), ...lines].map((cells) => `| ${cells.map(cellOf).join(' | ')} |`).join('\n') + '\n';
}

async function copy() {
  const text = asMarkdown(chosen().slice(0, COPIED));
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no https: the old way
    const area = el('textarea', { 'aria-hidden': 'true' });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
    at('copy').focus();
  }
  say(at('copy'), `Copied ${Math.min(chosen().length, COPIED)} rows`);
  setTimeout(() => say(at('copy'), 'Copy as Markdown'), 2000);
}

export function start(clockOfServer) {
  now = clockOfServer;
  const look = () => { shown = STEP; draw(); };
  at('filter').addEventListener('input', look);
  at('kind').addEventListener('change', look);
  at('copy').addEventListener('click', copy);
  at('more').addEventListener('click', () => { shown += 10 * STEP; draw(); });
}
