// Figures over time, drawn as SVG.

import { at, el, say, svg } from './parts.js';
import { get } from './server.js';
import { bytes, number, percent, seconds } from './words.js';

const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [380, 170, 52, 22, 8];
const EVERY_MS = 30_000;

const share = (point) => (point.n_reused + point.n_computed ? point.n_reused / (point.n_reused + point.n_computed) : null);

// What each figure draws: [legend, value of a point]. ``gap``: a time without requests has no value, not a zero.
const FIGURES = [
  { title: 'Prompt tokens reused', say: percent, most: 1, gap: true, lines: [['', share]] },
  { title: 'Prefill time saved', say: seconds, lines: [['', (point) => point.saved_s]] },
  { title: 'Time to first token', say: seconds, gap: true, lines: [['half of the requests', (point) => point.first_p50_s], ['95 of 100', (point) => point.first_p95_s]] },
  { title: 'Wait in the queue', say: seconds, lines: [['mean', (point) => (point.n ? point.queued_s / point.n : 0)], ['longest', (point) => point.longest_queued_s]] },
  { title: 'Requests', say: number, lines: [['all', (point) => point.n], ['not served', (point) => point.n_faults + point.n_unserved]] },
  { title: 'Snapshots on disk', say: bytes, isLevel: true, least: 2 ** 30, lines: [['', (point) => point.disk_bytes]] },
];

let asked = 0;

export async function refresh() {
  if (document.hidden) return;
  asked = Date.now();
  try {
    draw(await get('history', { span: at('span').value, by: at('by').value }));
  } catch { /* the stream of events reports a lost connection */ }
}

function draw(told) {
  const { step_s: step, now } = told;
  const last = Math.floor(now / step) * step;
  const times = [];
  for (let time = last - told.span_s + step; time <= last; time += step) times.push(time);
  const figures = FIGURES.map((figure) => {
    const lines = (figure.isLevel ? told.lines.slice(0, 1) : told.lines).flatMap((its, i) => {
      const points = new Map(its.points.map((point) => [point.at, point]));
      return figure.lines.map(([legend, value], j) => ({
        name: [its.name, legend].filter(Boolean).join(', '), colour: told.by === 'all' ? j : i % 6, dashed: j > 0, values: valuesOf(figure, value, times, points),
      }));
    });
    return plot(figure, lines, times, told);
  });
  at('figures').replaceChildren(...figures);
}

function valuesOf(figure, value, times, points) {
  let level = null;
  return times.map((time) => {
    const point = points.get(time);
    const found = point ? value(point) : null;
    if (figure.isLevel) return (level = found ?? level);
    return found ?? (figure.gap ? null : 0);
  });
}

const TIMES = [0.1, 0.2, 0.4, 1, 2, 4, 10, 20, 40, 60, 120, 240, 600, 1200, 2400, 3600, 7200, 14400, 36000, 72000];

// Return the top of a scale for values up to ``most``: a number whose half is round too.
function niceTop(most, figure) {
  if (figure.say === seconds && most <= TIMES.at(-1)) return TIMES.find((top) => top >= most);
  const unit = figure.say === bytes ? 1024 ** Math.floor(Math.log2(most) / 10) : 1;
  const size = unit * 10 ** Math.floor(Math.log10(most / unit));
  return [1, 2, 4, 10].map((factor) => factor * size).find((top) => top >= most * 0.999);
}

function plot(figure, lines, times, told) {
  const known = lines.flatMap((line) => line.values.filter((value) => value != null));
  const top = figure.most ?? niceTop(Math.max(...known, 0) || figure.least || 1, figure);
  const x = (i) => LEFT + ((WIDTH - LEFT - 6) * i) / Math.max(times.length - 1, 1);
  const y = (value) => HEIGHT - BOTTOM - ((HEIGHT - BOTTOM - TOP) * Math.min(value, top)) / top;
  const parts = [];
  for (const part of [0, 0.5, 1]) {
    parts.push(svg('line', { x1: LEFT, x2: WIDTH - 6, y1: y(part * top), y2: y(part * top), class: 'grid' }));
    const text = svg('text', { x: LEFT - 6, y: y(part * top) + 4, 'text-anchor': 'end' });
    text.textContent = part || figure.most ? figure.say(part * top).replace('.0 ', ' ') : '0';
    parts.push(text);
  }
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    const i = Math.round(part * (times.length - 1));
    const text = svg('text', { x: x(i), y: HEIGHT - 6, 'text-anchor': part === 1 ? 'end' : part ? 'middle' : 'start' });
    text.textContent = when(times[i], told.span);
    parts.push(text);
  }
  for (const line of lines) parts.push(path(line, x, y));
  const cursor = svg('line', { x1: 0, x2: 0, y1: TOP, y2: HEIGHT - BOTTOM, class: 'cursor', visibility: 'hidden' });
  const summary = lines.map((line) => `${line.name || figure.title}: ${latest(figure, line)}`).join('; ');
  const drawing = svg('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: 'img', 'aria-label': `${figure.title}, latest values. ${summary}` }, ...parts, cursor);
  const reading = el('p', { class: 'reading' }, known.length ? '' : 'nothing yet');
  const legend = lines.length > 1 ? el('p', { class: 'legend' }, ...lines.slice(0, 8).map((line) => el('span', {}, el('span', { class: `key line c${line.colour}${line.dashed ? ' dashed' : ''}` }), line.name))) : null;
  drawing.addEventListener('pointermove', (event) => {
    const box = drawing.getBoundingClientRect();
    const wanted = ((event.clientX - box.left) / box.width) * WIDTH;
    const i = Math.min(Math.max(Math.round(((wanted - LEFT) / (WIDTH - LEFT - 6)) * (times.length - 1)), 0), times.length - 1);
    for (const end of ['x1', 'x2']) cursor.setAttribute(end, x(i));
    cursor.setAttribute('visibility', 'visible');
    const values = lines.map((line) => `${line.name ? `${line.name} ` : ''}${line.values[i] == null ? '–' : figure.say(line.values[i])}`);
    say(reading, `${when(times[i], told.span, true)}: ${values.join(', ')}`);
  });
  drawing.addEventListener('pointerleave', () => {
    cursor.setAttribute('visibility', 'hidden');
    say(reading, known.length ? '' : 'nothing yet');
  });
  const per = figure.title === 'Prefill time saved' || figure.title === 'Requests' ? ` per ${{ hour: 'minute', day: 'quarter of an hour', month: '4 hours' }[told.span]}` : '';
  return el('figure', {}, el('figcaption', {}, el('h3', {}, figure.title + per), reading), drawing, legend);
}

function latest(figure, line) {
  const value = line.values.findLast((its) => its != null);
  return value == null ? 'nothing yet' : figure.say(value);
}

// Draw one line. A single point between two gaps becomes a dot.
function path(line, x, y) {
  let data = '';
  line.values.forEach((value, i) => {
    if (value == null) return;
    const isBegun = i > 0 && line.values[i - 1] != null;
    data += `${isBegun ? 'L' : 'M'}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
    if (!isBegun && line.values[i + 1] == null) data += 'm-1.5 0a1.5 1.5 0 1 0 3 0a1.5 1.5 0 1 0 -3 0';
  });
  return svg('path', { d: data || 'M0 0', class: `line c${line.colour}${line.dashed ? ' dashed' : ''}` });
}

function when(at_, span, isWhole = false) {
  const then = new Date(at_ * 1000);
  const time = then.toLocaleTimeString([], { hour: '2-digit', minute: '2-digit', hourCycle: 'h23' });
  const date = then.toLocaleDateString([], { day: 'numeric', month: 'short' });
  return span === 'month' ? (isWhole ? `${date} ${time}` : date) : time;
}

export function start() {
  at('span').addEventListener('change', refresh);
  at('by').addEventListener('change', refresh);
  setInterval(() => { if (!at('content').hidden && Date.now() - asked >= EVERY_MS) refresh(); }, 5000);
}
