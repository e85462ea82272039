// The model's text → DOM nodes. Nothing in the text can run, load or navigate by itself: HTML in it is shown as
// text, images become links, and all is sanitised before it is shown. Vendored: marked, DOMPurify, temml, hljs.
const { marked, DOMPurify, temml, hljs } = globalThis;

const escape = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

// $…$ only where it cannot be money: no space just inside it, no digit after it. $$…$$ and \[…\] end at their
// first closing delimiter.
const DISPLAY = String.raw`\$\$((?:(?!\$\$)[^])+)\$\$|\\\[((?:(?!\\\])[^])+)\\\]`;
const INLINE = new RegExp(String.raw`^(?:${DISPLAY}|\\\(((?:(?!\\\))[^])+)\\\)|\$(?!\s)((?:\\.|[^\\$\n])+?)(?<![\s\\])\$(?!\d))`);
const BLOCK = new RegExp(String.raw`^ {0,3}(?:${DISPLAY}|(\\begin\{((?:align|gather|equation)\*?)\}[^]+?\\end\{\4\})) *(?:\n|$)`);

function mathToken(type, src, rule) {
  const found = rule.exec(src);
  if (!found) return undefined;
  const [raw, dollars, brackets, third, dollar] = found;
  const display = Boolean(type === 'blockMath' || dollars || brackets);
  return { type, raw, tex: (dollars ?? brackets ?? third ?? dollar).trim(), display };
}

const math = (name, level, rule, start) => ({
  name,
  level,
  start: (src) => { const at = src.search(start); return at < 0 ? undefined : at; },
  tokenizer: (src) => mathToken(name, src, rule),
  renderer: ({ tex, display }) => `<span class="math${display ? ' display' : ''}">${escape(tex)}</span>`,
});

marked.use({
  breaks: true, // a single newline is a line break
  extensions: [
    math('blockMath', 'block', BLOCK, /^ {0,3}(?:\$\$|\\\[|\\begin\{)/m),
    math('inlineMath', 'inline', INLINE, /\$|\\\(|\\\[/),
  ],
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    code: ({ text, lang }) => code(text, (lang ?? '').match(/^\S*/)[0]),
  },
});

function code(text, language) {
  const known = hljs.getLanguage(language);
  const body = known ? hljs.highlight(text, { language, ignoreIllegals: true }).value : escape(text);
  const head = `<div class="code-head"><span>${escape(language)}</span><button class="quiet">Copy</button></div>`;
  return `<div class="code" dir="ltr">${head}<pre><code>${body}\n</code></pre></div>`;
}

const ALLOWED = {
  ALLOWED_TAGS: ['a', 'b', 'blockquote', 'br', 'button', 'code', 'del', 'div', 'em', 'h1', 'h2', 'h3', 'h4',
    'h5', 'h6', 'hr', 'i', 'input', 'li', 'ol', 'p', 'pre', 'span', 'strong', 'table', 'tbody', 'td', 'th',
    'thead', 'tr', 'ul'],
  ALLOWED_ATTR: ['href', 'class', 'align', 'start', 'type', 'checked', 'disabled', 'dir'],
  RETURN_DOM_FRAGMENT: true,
};

function render(tokens) {
  const fragment = DOMPurify.sanitize(marked.parser(tokens), ALLOWED);
  for (const link of fragment.querySelectorAll('a')) {
    Object.assign(link, { target: '_blank', rel: 'noopener noreferrer' });
  }
  for (const table of fragment.querySelectorAll('table')) {
    const wide = Object.assign(document.createElement('div'), { className: 'wide' });
    table.replaceWith(wide);
    wide.append(table);
  }
  for (const span of fragment.querySelectorAll('.math')) {
    span.replaceChildren(formula(span.textContent, span.classList.contains('display')));
  }
  return fragment;
}

// TeX as MathML; if it is not valid TeX, the source itself.
function formula(tex, displayMode) {
  try {
    const place = document.createElement('span');
    temml.render(tex, place, { displayMode, throwOnError: true, trust: false, maxSize: [20, 20] });
    return place.firstChild;
  } catch {
    return Object.assign(document.createElement('code'), { textContent: tex });
  }
}

// Shows `text` in `element`, block by block. Unchanged blocks are left alone while the text grows: this saves
// time, and keeps a selection in them.
export function show(element, text) {
  const tokens = marked.lexer(text);
  const links = JSON.stringify(tokens.links); // a new link definition may change any block
  const blocks = tokens.filter(({ type }) => type !== 'space' && type !== 'def');
  blocks.forEach((token, at) => {
    const old = element.children[at];
    const source = token.raw + links;
    if (old?.source === source) return;
    const block = Object.assign(document.createElement('div'), { source, dir: 'auto' });
    block.append(render(Object.assign([token], { links: tokens.links })));
    if (old) old.replaceWith(block); else element.append(block);
  });
  while (element.children.length > blocks.length) element.lastElementChild.remove();
}
