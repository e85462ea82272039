// The server's HTTP API. Knows requests and their failures. Does not know what is shown.
export class Refused extends Error {
  constructor(message, status, retryAfter) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

async function ask(path, key, options = {}) {
  const headers = { ...(options.body && { 'Content-Type': 'application/json' }), ...(key && { Authorization: `Bearer ${key}` }) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new Refused(body?.error?.message ?? `error ${answer.status}`, answer.status, answer.headers.get('Retry-After'));
}

export const models = async (key) => (await (await ask('v1/models', key)).json()).data;

export const stopThinking = (id, key) =>
  ask(`v1/chat/completions/${encodeURIComponent(id)}/stop_thinking`, key, { method: 'POST' });

// Yields the chunks of one reply as they come.
export async function* chat(body, key, signal) {
  const stream = { ...body, stream: true, stream_options: { include_usage: true } };
  const answer = await ask('v1/chat/completions', key, { method: 'POST', body: JSON.stringify(stream), signal });
  for await (const data of events(answer.body)) {
    if (data === '[DONE]') return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(chunk.error.message, answer.status);
    yield chunk;
  }
  throw new TypeError('the stream broke off');
}

// Yields the data of server-sent events, however the bytes are chunked.
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let text = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    const lines = text.split(/\r?\n/);
    text = lines.pop();
    for (const line of lines) if (line.startsWith('data:')) yield line.slice(5).trim();
  }
}
