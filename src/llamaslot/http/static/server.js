// Requests to llamaslot's own routes. The admin key goes into a header, never into an address.

const KEY = 'llamaslot.key';

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

async function send(method, path, query, signal) {
  const address = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(query ?? {})) address.searchParams.set(name, value);
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  const answer = await fetch(address, { method, headers, signal, cache: 'no-store' });
  if (answer.ok) return answer;
  let message = `${answer.status} ${answer.statusText}`;
  try {
    message = (await answer.json()).error.message;
  } catch { /* no JSON: the message is the status */ }
  throw new Refused(answer.status, message);
}

export const get = async (path, query) => (await send('GET', path, query)).json();
export const post = async (path, query) => (await send('POST', path, query)).json();

// Watch the stream of events until it ends or ``signal`` aborts it. Calls told(name, state) for each event, and heard()
// for each piece of data, comments included.
export async function watch(told, heard, signal) {
  const answer = await send('GET', 'events', {}, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    heard();
    const events = (rest + value).split('\n\n');
    rest = events.pop();
    for (const event of events) {
      const name = event.match(/^event: (.*)$/m)?.[1];
      const data = event.match(/^data: (.*)$/m)?.[1];
      if (name && data) told(name, JSON.parse(data));
    }
  }
}
