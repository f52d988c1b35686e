// Markdown as elements. Every letter of a text becomes a text node and every element is made by
// name from a short list, so that no answer can bring markup, scripts or pictures of its own.
"use strict";

const Markdown = (() => {
  const DEEPEST = 12; // what is nested deeper is shown as it is written
  const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
  const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +|$)/;
  const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
  const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
  const QUOTE = /^ {0,3}> ?/;
  const COLUMNS = /^ {0,3}\|? *:?-+:? *(\| *:?-+:? *)*\|? *$/;

  function make(name, content, className) {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (typeof content === "string") element.textContent = content;
    else if (content) element.append(...content);
    return element;
  }

  const isTable = (lines, at) =>
    lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") &&
    lines[at + 1].includes("|") && COLUMNS.test(lines[at + 1]);

  const begins = (lines, at) =>
    FENCE.test(lines[at]) || HEADING.test(lines[at]) || QUOTE.test(lines[at]) ||
    RULE.test(lines[at]) || ITEM.test(lines[at]) || isTable(lines, at);

  // Returns the blocks of some lines: {kind, lines}.
  function split(lines) {
    const blocks = [];
    let at = 0;
    const take = (kind, end) => {
      blocks.push({ kind, lines: lines.slice(at, end) });
      at = end;
    };
    while (at < lines.length) {
      const line = lines[at];
      let end = at + 1;
      const fence = FENCE.exec(line);
      if (!line.trim()) {
        at += 1;
      } else if (fence) {
        const [mark] = fence[1];
        const closes = (text) => {
          const bare = text.trim();
          return bare.length >= fence[1].length && bare === mark.repeat(bare.length);
        };
        while (end < lines.length && !closes(lines[end])) end += 1;
        take("code", Math.min(end + 1, lines.length));
      } else if (HEADING.test(line)) {
        take("heading", end);
      } else if (RULE.test(line)) {
        take("rule", end);
      } else if (QUOTE.test(line)) {
        while (end < lines.length && QUOTE.test(lines[end])) end += 1;
        take("quote", end);
      } else if (ITEM.test(line)) {
        take("list", endOfList(lines, at));
      } else if (isTable(lines, at)) {
        end = at + 2;
        while (end < lines.length && lines[end].includes("|")) end += 1;
        take("table", end);
      } else {
        while (end < lines.length && lines[end].trim() && !begins(lines, end)) end += 1;
        take("text", end);
      }
    }
    return blocks;
  }

  const isNumbered = (line) => /\d/.test(ITEM.exec(line)[2]);

  function endOfList(lines, at) {
    const numbered = isNumbered(lines[at]);
    let end = at + 1;
    while (end < lines.length) {
      const line = lines[end];
      if (!line.trim()) {
        const next = lines[end + 1];
        if (next === undefined || !next.trim()) break;
        if (!/^ {2}/.test(next) && !(ITEM.test(next) && isNumbered(next) === numbered)) break;
      } else if (!/^ {2}/.test(line)) {
        if (ITEM.test(line) ? isNumbered(line) !== numbered : begins(lines, end)) break;
        if (!ITEM.test(line) && !lines[end - 1].trim()) break;
      }
      end += 1;
    }
    return end;
  }

  function block({ kind, lines }, depth) {
    if (depth > DEEPEST) return make("p", lines.join("\n"));
    switch (kind) {
      case "code": return code(lines);
      case "heading": {
        const [, marks, text] = HEADING.exec(lines[0]);
        return make(`h${marks.length}`, inline(text));
      }
      case "rule": return make("hr");
      case "quote": {
        const inner = lines.map((line) => line.replace(QUOTE, ""));
        return make("blockquote", split(inner).map((one) => block(one, depth + 1)));
      }
      case "list": return list(lines, depth);
      case "table": return table(lines);
      default: return make("p", inline(lines.join("\n")));
    }
  }

  function code(lines) {
    const [, mark, language] = FENCE.exec(lines[0]);
    const last = lines[lines.length - 1].trim();
    const closed = lines.length > 1 && last.length >= mark.length && !last.replaceAll(mark[0], "");
    const text = lines.slice(1, closed ? -1 : undefined).join("\n");
    const head = make("div", [make("span", language.trim().slice(0, 40))], "code-head");
    return make("div", [head, make("pre", [make("code", text)])], "code");
  }

  function list(lines, depth) {
    const items = [];
    let width = 0;
    for (const line of lines) {
      const found = ITEM.exec(line);
      // One that stands as far in as an item's text is an item within it.
      if (found && (items.length === 0 || found[1].length < width)) {
        width = found[0].length;
        items.push([line.slice(width)]);
      } else {
        const indent = /^ */.exec(line)[0].length;
        items[items.length - 1].push(line.slice(Math.min(indent, Math.max(width, 2))));
      }
    }
    const numbered = isNumbered(lines[0]);
    const made = make(numbered ? "ol" : "ul");
    if (numbered) made.start = parseInt(ITEM.exec(lines[0])[2], 10);
    for (const item of items) {
      const parts = split(item);
      // An item of one line is no paragraph of its own.
      const inner = parts.flatMap((one) =>
        one.kind === "text" ? inline(one.lines.join("\n")) : [block(one, depth + 1)]);
      made.append(make("li", inner));
    }
    return made;
  }

  function cells(line) {
    const bare = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
    return bare.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  }

  function table([head, marks, ...rows]) {
    const sides = cells(marks).map((mark) =>
      (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : ""));
    const row = (line, name) => {
      const found = cells(line).slice(0, sides.length);
      return make("tr", found.map((cell, index) => make(name, inline(cell), sides[index])));
    };
    const made = make("table", [
      make("thead", [row(head, "th")]),
      make("tbody", rows.map((line) => row(line, "td"))),
    ]);
    return make("div", [made], "table");
  }

  const LINK = /!?\[([^[\]\n]{0,500})\]\(\s*<?([^\s()<>]{1,2000}(?:\([^\s()<>]{0,200}\))?[^\s()<>]{0,500})>?(?:\s+"[^"\n]{0,300}")?\s*\)/y;
  const ADDRESS = /https?:\/\/[^\s<>"'`|\u3000-\u303f\uff00-\uffef]{1,2000}/y;
  const BREAK = /<br\s{0,3}\/?>/iy;
  const PUNCTUATION = /[!-/:-@[-`{-~]/;
  const MARKS = { "**": "strong", "__": "strong", "~~": "del", "*": "em", _: "em" };

  function link(text, address) {
    const made = make("a", text);
    // Nothing but these: no javascript:, no data:.
    if (!/^(https?:\/\/|mailto:)/i.test(address)) return make("span", text);
    made.href = address;
    made.target = "_blank";
    made.rel = "noopener noreferrer nofollow";
    return made;
  }

  function match(pattern, text, at) {
    pattern.lastIndex = at;
    return pattern.exec(text);
  }

  // Returns nodes for a text within a block.
  function inline(text, depth = 0) {
    const nodes = [];
    let plain = "";
    let at = 0;
    const unclosed = new Set(); // marks that have no partner in the rest
    const put = (node, size) => {
      if (plain) nodes.push(document.createTextNode(plain));
      plain = "";
      nodes.push(node);
      at += size;
    };
    while (at < text.length) {
      const letter = text[at];
      let found;
      if (letter === "\n") {
        put(make("br"), 1);
      } else if (letter === "\\" && at + 1 < text.length) {
        const close = { "(": "\\)", "[": "\\]" }[text[at + 1]];
        const end = close && !unclosed.has(close) ? text.indexOf(close, at + 2) : -1;
        if (close && end < 0) unclosed.add(close);
        if (end >= 0) {
          put(make("span", text.slice(at, end + 2), "math"), end + 2 - at);
        } else {
          const escapes = PUNCTUATION.test(text[at + 1]) && !close;
          plain += escapes ? text[at + 1] : text.slice(at, at + 2);
          at += 2;
        }
      } else if (letter === "$" && text[at + 1] === "$" && text.indexOf("$$", at + 2) >= 0) {
        const end = text.indexOf("$$", at + 2) + 2;
        put(make("span", text.slice(at, end), "math"), end - at);
      } else if (letter === "`") {
        const marks = match(/`+/y, text, at)[0];
        const end = unclosed.has(marks) ? -1 : closing(text, marks, at + marks.length);
        if (end < 0) {
          unclosed.add(marks);
          plain += marks;
          at += marks.length;
        } else {
          const inner = text.slice(at + marks.length, end);
          const padded = /^ .*[^ ].* $/s.test(inner);
          put(make("code", padded ? inner.slice(1, -1) : inner), end + marks.length - at);
        }
      } else if ((letter === "[" || letter === "!") && (found = match(LINK, text, at))) {
        put(link(found[1] || found[2], found[2]), found[0].length);
      } else if (letter === "h" && (found = match(ADDRESS, text, at))) {
        const address = found[0].replace(/[.,;:!?)\]*_~]+$/, "");
        put(link(address, address), address.length);
      } else if (letter === "<" && (found = match(BREAK, text, at))) {
        put(make("br"), found[0].length);
      } else if ("*_~".includes(letter) && depth < DEEPEST) {
        const mark = text.startsWith(letter + letter, at) ? letter + letter : letter;
        const end = MARKS[mark] && !unclosed.has(mark) ? partner(text, mark, at) : -1;
        if (end < 0) {
          if (end === -2) unclosed.add(mark);
          plain += mark;
          at += mark.length;
        } else {
          const inner = inline(text.slice(at + mark.length, end), depth + 1);
          put(make(MARKS[mark], inner), end + mark.length - at);
        }
      } else {
        plain += letter;
        at += 1;
      }
    }
    if (plain) nodes.push(document.createTextNode(plain));
    return nodes;
  }

  // Where as many backticks stand alone.
  function closing(text, marks, from) {
    for (let at = text.indexOf(marks, from); at >= 0;) {
      const size = match(/`+/y, text, at)[0].length;
      if (size === marks.length) return at;
      at = text.indexOf(marks, at + size);
    }
    return -1;
  }

  const isWord = (letter) => letter !== undefined && /[\p{L}\p{N}]/u.test(letter);
  const isSpace = (letter) => letter === undefined || /\s/.test(letter);

  // Where emphasis ends; -1 where none begins, -2 where nothing ends it.
  function partner(text, mark, at) {
    const after = at + mark.length;
    if (isSpace(text[after])) return -1;
    if (mark[0] === "_" && isWord(text[at - 1])) return -1;
    for (let end = text.indexOf(mark, after + 1); end >= 0; end = text.indexOf(mark, end + 1)) {
      // Of a longer run the last ones end what began first: **a *b***.
      if (mark.length === 2) while (text[end + 2] === mark[0]) end += 1;
      const next = text[end + mark.length];
      const other = mark.length === 1 && (next === mark || text[end - 1] === mark);
      if (!other && !isSpace(text[end - 1]) && !(mark[0] === "_" && isWord(next))) return end;
    }
    return -2;
  }

  // Shows a text in an element; of one that grew, only the blocks that changed are made again.
  function show(element, text, finish = () => {}) {
    const blocks = split(text.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n"));
    blocks.forEach((one, index) => {
      const source = one.kind + "\n" + one.lines.join("\n");
      const before = element.children[index];
      if (before && before.source === source) return;
      const made = block(one, 0);
      made.source = source;
      finish(made);
      if (before) before.replaceWith(made);
      else element.append(made);
    });
    while (element.children.length > blocks.length) element.lastElementChild.remove();
  }

  return { show, make };
})();
