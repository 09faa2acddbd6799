// Python source as HTML with its words, numbers, strings and comments marked.

const PYTHON_WORDS = new Set(
  ("and as assert break class continue def del elif else except finally for from global if import " +
   "in is lambda nonlocal not or pass raise return try while with yield None True False").split(" "));
const PYTHON_TOKEN =
  /(#[^\n]*)|("""[\s\S]*?"""|'''[\s\S]*?'''|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|(\b\d[\w.]*)|([A-Za-z_]\w*)/g;

function escapeHtml(text) {
  return String(text).replace(/[&<>"]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}[c]));
}

function highlight(source) {
  let html = "", last = 0;
  for (const match of source.matchAll(PYTHON_TOKEN)) {
    const [token, note, text, number, name] = match;
    html += escapeHtml(source.slice(last, match.index));
    last = match.index + token.length;
    const kind = note ? "note" : text ? "text" : number ? "number"
      : PYTHON_WORDS.has(name) ? "word" : source[last] === "(" ? "called" : "";
    html += kind ? `<span class="${kind}">${escapeHtml(token)}</span>` : escapeHtml(token);
  }
  return html + escapeHtml(source.slice(last));
}
