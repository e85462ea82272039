// The page: a conversation kept in this browser, one reply at a time. Does not know HTTP (client.js), or how
// text is rendered (markdown.js).
import { chat, models, Refused, stopThinking } from './client.js';
import { show } from './markdown.js';

const $ = (id) => document.getElementById(id);
const list = $('turns');
const question = $('question');

let turns = stored('turns', []); // {role, content, reasoning, seconds, thought, tokens, rate, problem, note}
let before = stored('before', []); // the conversation before this one
let settings = stored('settings', {});
let running = null; // {turn, id, abort, since}: the reply that is being streamed
let editing = null; // the turn that the next message replaces, with all after it
let leaving = false; // whether the page is being left: errors are then expected
let pinned = true; // whether the page scrolls with the text

// --- storage ---

function stored(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`magistral.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function keep(name, value) {
  try {
    localStorage.setItem(`magistral.${name}`, typeof value === 'string' ? value : JSON.stringify(value));
  } catch {
    tell('This browser cannot store any more: a reload will lose the latest messages.');
  }
}

const key = () => sessionStorage.getItem('magistral.key');

// --- one reply ---

function request() {
  const { think = true, system, ...numbers } = settings;
  const earlier = turns.slice(0, -1).filter(({ content }) => content);
  const messages = earlier.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: 'system', content: system });
  return { messages, ...(!think && { reasoning_effort: 'none' }), ...numbers };
}

async function reply() {
  const turn = { role: 'assistant', content: '', reasoning: '', unfinished: true };
  turns.push(turn);
  running = { turn, abort: new AbortController() };
  pinned = true;
  keep('turns', turns);
  draw();
  tell('Reading');
  try {
    for await (const chunk of chat(request(), key(), running.abort.signal)) take(chunk);
    tell('Answered');
  } catch (error) {
    if (leaving) return;
    failed(turn, error);
  }
  running = null;
  delete turn.unfinished;
  keep('turns', turns);
  draw();
}

function take({ id, choices: [choice], usage }) {
  const { turn } = running;
  const now = performance.now();
  running.id = id;
  if (usage) {
    turn.tokens = usage.completion_tokens;
    turn.thought = usage.completion_tokens_details?.reasoning_tokens ?? turn.thought;
    const seconds = (now - running.since) / 1000;
    if (seconds > 0.2) turn.rate = turn.tokens / seconds; // below that, delivery is measured, not decoding
  }
  const { reasoning_content: reasoning, content } = choice?.delta ?? {};
  if (reasoning || content) running.since ??= now;
  if (reasoning) {
    turn.reasoning += reasoning;
    turn.thought = (turn.thought ?? 0) + 1;
  }
  if (turn.reasoning && !turn.content) turn.seconds = (now - running.since) / 1000;
  if (content) turn.content += content;
  if (choice?.finish_reason === 'length') turn.note = 'Cut off at the token limit.';
  soon();
}

function failed(turn, error) {
  if (error.name === 'AbortError') {
    turn.note = 'Stopped.';
    tell('Stopped');
  } else if (error instanceof Refused && [401, 403].includes(error.status)) {
    turn.problem = sentence(error.message);
    askKey();
  } else if (error instanceof Refused && error.status === 429) {
    const wait = error.retryAfter ? ` in ${error.retryAfter} s` : ' in a moment';
    turn.problem = `The server is busy with others. Try again${wait}.`;
  } else if (error instanceof Refused) {
    turn.problem = sentence(error.message);
  } else {
    turn.problem = turn.content || turn.reasoning
      ? 'The connection broke off. Is the server still running?'
      : 'The server cannot be reached. Is it still running?';
  }
  if (turn.problem) tell(turn.problem);
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? '' : '.');

function stop() {
  running?.abort.abort();
  write();
}

async function answerNow() {
  tell('Asked for the answer');
  list.lastElementChild.querySelector('summary').focus(); // the button disappears and would lose the focus
  await stopThinking(running.id, key()).catch((error) => tell(error.message));
}

// --- display ---

const tell = (text) => { $('status').textContent = text; };

function draw() {
  turns.forEach((turn, at) => {
    const old = list.children[at];
    if (old?.turn === turn) { paint(old); return; }
    const item = made(turn);
    if (old) old.replaceWith(item); else list.append(item);
    paint(item);
  });
  while (list.children.length > turns.length) list.lastElementChild.remove();
  $('welcome').hidden = turns.length > 0;
  $('before').hidden = !before.length;
  $('new').disabled = !turns.length;
  $('send').hidden = running;
  $('stop').hidden = !running;
  $('hint').textContent = editing ? 'Sending replaces your message and all behind it · Esc leaves it as it is'
    : running ? 'Esc stops' : 'Enter sends · Shift + Enter begins a new line';
  ready();
  follow();
}

function made(turn) {
  const item = $('turn').content.firstElementChild.cloneNode(true);
  item.turn = turn;
  item.className = turn.role;
  item.querySelector('.who').textContent = turn.role === 'user' ? 'You said' : 'Magistral said';
  const others = turn.role === 'user' ? '.thinking, .answer-now, .problem, [data-do=again]' : '[data-do=edit]';
  for (const part of item.querySelectorAll(others)) part.remove();
  item.querySelector('.thinking')?.addEventListener('toggle', ({ target }) => { if (target.open) paint(item); });
  return item;
}

function paint(item) {
  const { turn } = item;
  const live = running?.turn === turn;
  item.setAttribute('aria-busy', live);
  if (turn.role === 'user') {
    item.dataset.phase = 'done';
    item.querySelector('.text').textContent = turn.content;
  } else {
    const phase = !live ? 'done' : turn.content ? 'answering' : turn.reasoning ? 'thinking' : 'reading';
    paintReply(turn, phase, item);
  }
}

function paintReply(turn, phase, item) {
  const part = (name) => item.querySelector(name);
  const [thinking, reasoning] = [part('.thinking'), part('.reasoning')];
  const before = item.dataset.phase;
  if (before && before !== phase) {
    if (before !== 'answering') thinking.open = !turn.content; // after that, the user decides
    tell({ thinking: 'Thinking', answering: 'Answering' }[phase] ?? $('status').textContent);
  }
  item.dataset.phase = phase;
  thinking.hidden = !turn.reasoning;
  part('.thought').textContent = thought(turn, phase);
  if (thinking.open) show(reasoning, turn.reasoning);
  if (phase === 'thinking') reasoning.scrollTop = reasoning.scrollHeight;
  part('.answer-now').hidden = phase !== 'thinking';
  show(part('.text'), turn.content);
  part('.actions').hidden = phase !== 'done' || !(turn.content || turn.note);
  const left = turn.unfinished && phase === 'done' && 'The page was left before the answer was whole.';
  part('.problem span').textContent = turn.problem ?? (left || '');
  part('.problem').hidden = !turn.problem && !left;
  const rate = turn.rate ? ` · ${turn.rate.toFixed(turn.rate < 10 ? 1 : 0)} tokens/s` : '';
  part('.figures').textContent = turn.note ?? (turn.tokens ? `${count(turn.tokens)}${rate}` : '');
}

const count = (tokens) => `${tokens.toLocaleString('en')} token${tokens === 1 ? '' : 's'}`;

function thought(turn, phase) {
  const seconds = Math.round(turn.seconds ?? 0);
  const time = seconds < 1 ? 'a moment' : seconds < 60 ? `${seconds} s` : `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  const tokens = turn.thought ? ` · ${count(turn.thought)}` : '';
  return phase === 'thinking' ? `Thinking${seconds < 1 ? '' : ` · ${time}`}${tokens}` : `Thought for ${time}${tokens}`;
}

let due = false;
let cost = 0;

// Draws new text, using at most half of the time: a long reply must not make the page unresponsive.
function soon() {
  if (due) return;
  due = true;
  setTimeout(() => requestAnimationFrame(() => {
    due = false;
    const start = performance.now();
    if (running) paint(list.lastElementChild);
    follow();
    cost = performance.now() - start;
  }), Math.min(cost, 500));
}

function follow() {
  if (pinned) scrollTo({ top: document.documentElement.scrollHeight });
  $('down').hidden = pinned;
}

addEventListener('scroll', () => {
  const { scrollHeight, clientHeight, scrollTop } = document.documentElement;
  pinned = scrollHeight - clientHeight - scrollTop < 48;
  $('down').hidden = pinned;
}, { passive: true });

// --- input ---

const touched = () => matchMedia('(hover: none)').matches; // there, focus would bring up the keyboard

function write() {
  if (!touched()) question.focus();
}

function send(text) {
  if (running || !text.trim()) return;
  if (editing) turns.length = turns.indexOf(editing);
  editing = null;
  turns.push({ role: 'user', content: text.trim() });
  question.value = '';
  reply();
}

function edit(turn) {
  if (running) return;
  editing = turn;
  question.value = turn?.content ?? '';
  draw();
  question.focus();
}

function again(turn) {
  if (running) return;
  turns.length = turns.indexOf(turn);
  editing = null;
  write();
  reply();
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not available over plain http from another machine
    const area = document.body.appendChild(Object.assign(document.createElement('textarea'), { value: text }));
    area.select();
    document.execCommand('copy');
    area.remove();
  }
  tell('Copied');
  button.classList.add('copied');
  setTimeout(() => button.classList.remove('copied'), 1500);
}

list.addEventListener('click', ({ target }) => {
  const button = target.closest('button');
  if (!button) return;
  const { turn } = button.closest('li[data-phase]');
  if (button.closest('.code-head')) copy(button.closest('.code').querySelector('pre').textContent, button);
  if (button.dataset.do === 'copy') copy(turn.content, button);
  if (button.dataset.do === 'edit') edit(turn);
  if (button.dataset.do === 'again') again(turn);
  if (button.dataset.do === 'answer') answerNow();
});

function ready() {
  $('send').disabled = !question.value.trim();
  question.style.height = 'auto';
  question.style.height = `${question.scrollHeight}px`;
}

question.addEventListener('input', ready);

question.addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing || touched()) return; // touch keyboards have no Shift + Enter
  event.preventDefault();
  send(question.value);
});

addEventListener('keydown', (event) => {
  if (event.key !== 'Escape' || event.isComposing || document.querySelector('dialog[open]')) return;
  if (running) stop();
  else if (editing) edit(null);
});

$('composer').addEventListener('submit', (event) => {
  event.preventDefault();
  send(question.value);
});

$('stop').addEventListener('click', stop);
$('examples').addEventListener('click', ({ target }) => { if (target.matches('button')) send(target.textContent); });
$('down').addEventListener('click', () => { pinned = true; follow(); });

$('new').addEventListener('click', () => {
  stop();
  begin([], turns);
});

$('back').addEventListener('click', () => begin(before, []));
$('forget').addEventListener('click', () => begin([], []));

function begin(now, then) {
  [turns, before] = [now, then];
  keep('turns', turns);
  keep('before', before);
  edit(null);
}

$('theme').addEventListener('click', () => {
  const { dataset } = document.documentElement;
  const dark = dataset.theme ? dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
  dataset.theme = dark ? 'light' : 'dark';
  keep('theme', dataset.theme);
});

const form = $('settings').querySelector('form');

function fill() {
  for (const input of form.querySelectorAll('[name]')) {
    if (input.type === 'checkbox') input.checked = settings[input.name] ?? true;
    else input.value = settings[input.name] ?? '';
  }
}

form.addEventListener('input', ({ target }) => {
  if (!target.checkValidity()) return;
  if (target.type === 'checkbox') settings[target.name] = target.checked;
  else if (target.value === '') delete settings[target.name];
  else settings[target.name] = target.type === 'number' ? Number(target.value) : target.value;
  keep('settings', settings);
});

$('open-settings').addEventListener('click', () => { fill(); $('settings').showModal(); });
$('defaults').addEventListener('click', () => { settings = {}; keep('settings', settings); fill(); });

function askKey() {
  $('key-text').textContent = (key() ? 'That key is not the right one. ' : '')
    + 'The one it was started with. It is kept until this tab is closed.';
  if (!$('ask-key').open) $('ask-key').showModal();
}

$('no-key').addEventListener('click', () => $('ask-key').close());
$('ask-key').querySelector('form').addEventListener('submit', ({ target }) => {
  sessionStorage.setItem('magistral.key', target.elements.key.value);
  target.reset();
  greet();
  const last = turns.at(-1);
  if (last?.problem) again(last);
});

async function greet() {
  try {
    const [first] = await models(key());
    $('model').textContent = first.id.split('/').at(-1);
    $('model').title = first.id;
  } catch (error) {
    if ([401, 403].includes(error.status)) askKey();
    else $('hint').textContent = 'The server cannot be reached.';
  }
}

for (const event of ['beforeunload', 'pagehide']) {
  addEventListener(event, () => {
    leaving = true;
    if (running) keep('turns', turns);
  });
}
addEventListener('pageshow', () => { leaving = false; });

draw();
greet();
