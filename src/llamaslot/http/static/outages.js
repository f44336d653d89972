// What does not work now, and what did not work lately: a line for each backend that is or was away.

import { at, el, keyed, say } from './parts.js';
import * as activity from './activity.js';
import { clock, elapsed, number, reason } from './words.js';

const TOLD_S = 3600; // an outage that has ended is told for so long

// Draw the lines. ``backends``: all of them; ``now``: the time in seconds since 1970.
export function draw(backends, now) {
  const told = backends.filter(({ outage }) => outage && (outage.ended === null || now - outage.ended < TOLD_S));
  at('outages').hidden = told.length === 0;
  keyed(at('outages'), told, (its) => its.name,
    () => el('li', {}, el('strong', {}), ' ', el('span', {})),
    (line, its) => {
      const { began, ended } = its.outage;
      line.className = ended === null ? 'bad' : 'over';
      say(line.children[0], ended === null ? `${its.name} is down since ${clock(began)} (${elapsed(now - began)}).` : `${its.name} is up again.`);
      const lost = unserved(began, ended ?? now);
      say(line.children[1], (ended === null
        ? [whyOf(its), effectOf(its, backends), lost]
        : [`It was down for ${elapsed(ended - began)}, from ${clock(began)} to ${clock(ended)}.`, lost]).filter(Boolean).join(' '));
    });
}

// What the operator can do is told in full of a server that has never been up.
function whyOf({ why_down: why, last_model: model }) {
  if (!why) return 'llama-server has restarted, llamaslot connects to it.';
  return `${model ? reason(why) : why}.`;
}

function effectOf(its, backends) {
  const others = backends.filter((other) => other !== its && other.model && other.model === its.last_model && other.health === 'up');
  if (others.length) return `${others.map((other) => other.name).join(' and ')} ${others.length > 1 ? 'take' : 'takes'} its requests.`;
  return its.health === 'connecting' ? 'Requests wait for that.' : 'Requests get an error (503) until it is up. llamaslot asks each second.';
}

function unserved(began, ended) {
  const n = activity.unserved(began - 1, ended + 1);
  return n ? `${number(n)} request${n === 1 ? ' was' : 's were'} not served.` : '';
}
