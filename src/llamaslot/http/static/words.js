// Numbers and names in words.

export const number = (n) => (n ?? 0).toLocaleString('en');

export function short(n) {
  if (n >= 1e9) return `${(n / 1e9).toPrecision(3)} G`;
  if (n >= 1e6) return `${(n / 1e6).toPrecision(3)} M`;
  if (n >= 1e4) return `${Math.round(n / 1e3)} k`;
  return number(Math.round(n));
}

export function bytes(n) {
  for (const [unit, factor] of [['TiB', 2 ** 40], ['GiB', 2 ** 30], ['MiB', 2 ** 20], ['KiB', 2 ** 10]]) {
    if (n >= factor) return `${(n / factor).toFixed(n < 100 * factor ? 1 : 0)} ${unit}`;
  }
  return `${n ?? 0} B`;
}

export function seconds(s) {
  if (s == null) return '–';
  if (s < 0.0005) return '0 s';
  if (s < 0.1) return `${Math.round(s * 1000)} ms`;
  if (s < 10) return `${s < 1 ? s.toFixed(2) : s.toFixed(1)} s`;
  if (s < 120) return `${Math.round(s)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${(s / 3600).toFixed(1)} h`;
  return `${Math.round(s / 86400)} d`;
}

// The time for which something has run: 7 s, 1:07, 1:02:05.
export function elapsed(s) {
  const whole = Math.max(Math.floor(s), 0);
  const [h, m, sec] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  if (!h && !m) return `${sec} s`;
  const two = (n) => String(n).padStart(2, '0');
  return h ? `${h}:${two(m)}:${two(sec)}` : `${m}:${two(sec)}`;
}

export const percent = (share) => (share == null ? '–' : `${(share * 100).toFixed(share === 1 || share === 0 || (share >= 0.1 && share < 0.95) ? 0 : 1)} %`);

// The name of a model. llama-server names a model without an alias by its path: then the file's name.
export const modelName = (name) => name.replace(/^.*\//, '').replace(/\.gguf$/, '');

// The name of a user, without the ``key:``, ``named:`` or ``at:`` before it.
export const person = (user) => (user ? user.replace(/^(key|named|at):/, '') : 'llamaslot');

export function clock(at) {
  const then = new Date(at * 1000);
  const time = then.toLocaleTimeString([], { hour: '2-digit', minute: '2-digit', second: '2-digit', hourCycle: 'h23' });
  const isToday = then.toDateString() === new Date().toDateString();
  return isToday ? time : `${then.toLocaleDateString([], { day: 'numeric', month: 'short' })} ${time.slice(0, 5)}`;
}

export const day = (at) => new Date(at * 1000).toLocaleDateString([], { day: 'numeric', month: 'long', year: 'numeric' });

// Why a request was not served, without the advice that llamaslot's errors end with.
export const reason = (error) => error.replace(/ \(.*\)/s, '').replace(/;[^;]*$/, '');

export const OUTCOMES = {
  done: 'answered', left: 'client left', cancelled: 'cancelled', refused: 'refused', unserved: 'not served', fault: 'llamaslot failed',
};
