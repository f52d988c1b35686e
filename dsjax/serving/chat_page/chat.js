// The conversation: what is asked of the server, and its answer as it comes.
"use strict";

const $ = (id) => document.getElementById(id);
const { make } = Markdown;
const OPTIONS = ["temperature", "topP", "maxTokens"];
const FIELDS = { temperature: "temperature", topP: "top_p", maxTokens: "max_tokens" };

const stored = (place, name, usual) => {
  try {
    return JSON.parse(place.getItem(`dsjax.${name}`)) ?? usual;
  } catch {
    return usual;
  }
};
const keep = (place, name, value) => {
  try {
    place.setItem(`dsjax.${name}`, JSON.stringify(value));
  } catch { /* a full or forbidden store keeps nothing */ }
};

const settings = stored(localStorage, "settings", {});
// Of OpenAI's form, and beside it: note, fault, and the results of calls.
let messages = stored(sessionStorage, "messages", []);
let key = stored(sessionStorage, "key", "");
let running = null; // stops the answer under way

// Words

const language = () => settings.language ?? (navigator.language.startsWith("zh") ? "zh" : "en");
const say = (word, values = {}) =>
  WORDS[language()][word].replace(/\{(\w+)\}/g, (_, name) => values[name]);

function translate() {
  document.documentElement.lang = language();
  document.title = say("title");
  for (const element of document.querySelectorAll("[data-word]")) {
    element.textContent = say(element.dataset.word);
  }
  $("text").placeholder = say("ask");
  $("text").setAttribute("aria-label", say("ask"));
}

// The conversation on the page

let views = [];

function drawAll() {
  $("log").replaceChildren();
  views = messages.map((message) => new View(message));
  scroll(true);
}

function scroll(always) {
  const log = $("log");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) {
    log.scrollTop = log.scrollHeight;
  }
}

function remember() {
  keep(sessionStorage, "messages", messages);
}

// The server

const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

async function failure(response) {
  if (response.status === 401) {
    openSettings(say("needsKey"));
    return new Error(say("needsKey"));
  }
  if (response.status === 429) {
    return new Error(say("full", { seconds: response.headers.get("retry-after") ?? 1 }));
  }
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `HTTP ${response.status}`);
}

async function findModels() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw await failure(response);
    const names = (await response.json()).data.map((one) => one.id);
    if (!names.includes(settings.model)) settings.model = names[0];
    $("models").replaceChildren(...names.map((name) => new Option(name, name)));
    $("models").value = settings.model;
    $("model").textContent = settings.model;
  } catch (fault) {
    $("model").textContent = fault instanceof TypeError ? say("unreachable") : fault.message;
  }
}

// Gives the events of a stream, wherever its pieces are cut.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function request() {
  const sent = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const { role, content, reasoning_content, tool_calls, fault } of messages) {
    if (role === "user") sent.push({ role, content });
    else if (tool_calls?.length) {
      const calls = tool_calls.map(({ id, type, function: called }) => ({ id, type, function: called }));
      sent.push({ role, content: content || null, tool_calls: calls });
      for (const { id, result } of tool_calls) {
        sent.push({ role: "tool", tool_call_id: id, content: result ?? "" });
      }
    } else if (content || !fault) {
      sent.push(reasoning_content ? { role, content, reasoning_content } : { role, content });
    }
  }
  const body = { model: settings.model, messages: sent, stream: true, stream_options: { include_usage: true } };
  for (const name of OPTIONS) {
    if (settings[name]) body[FIELDS[name]] = Number(settings[name]);
  }
  if (settings.tools) body.tools = JSON.parse(settings.tools);
  return body;
}

function take(message, delta) {
  if (delta.content) message.content += delta.content;
  if (delta.reasoning_content) message.reasoning_content += delta.reasoning_content;
  for (const piece of delta.tool_calls ?? []) {
    const call = (message.tool_calls[piece.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    if (piece.id) call.id = piece.id;
    if (piece.function?.name) call.function.name = piece.function.name;
    call.function.arguments += piece.function?.arguments ?? "";
  }
  return Boolean(delta.content || delta.reasoning_content || delta.tool_calls);
}

async function answer() {
  if (running) return;
  const body = request();
  const message = { role: "assistant", content: "", reasoning_content: "", tool_calls: [] };
  running = new AbortController();
  messages.push(message);
  views.at(-1)?.draw();
  const view = new View(message);
  views.push(view);
  busy(true);
  scroll(true);
  const begun = performance.now();
  const times = { begun, first: 0, last: begun, count: 0 };
  let finish = null;
  let frame = 0;
  const draw = () => {
    frame = 0;
    view.draw();
    view.foot.textContent = note(times, null);
    scroll(false);
  };
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(body),
      signal: running.signal,
    });
    if (!response.ok) throw await failure(response);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) times.count = event.usage.completion_tokens;
      for (const choice of event.choices) {
        if (take(message, choice.delta)) {
          times.last = performance.now();
          times.first ||= times.last;
          times.count += 1; // an event a token, but for what a character or mark takes several of
        }
        finish = choice.finish_reason ?? finish;
      }
      frame ||= requestAnimationFrame(draw);
    }
  } catch (fault) {
    if (fault.name === "AbortError") finish = "stopped";
    else message.fault = fault instanceof TypeError ? say("unreachable") : fault.message;
  }
  cancelAnimationFrame(frame);
  running = null;
  message.note = note(times, finish);
  remember();
  view.draw();
  busy(false);
  scroll(false);
}

function note(times, finish) {
  const parts = [];
  if (times.count) parts.push(say("tokens", { count: times.count }));
  if (times.count > 1 && times.last > times.first) {
    const rate = ((times.count - 1) * 1000) / (times.last - times.first);
    parts.push(say("speed", { rate: rate.toFixed(1) }));
  }
  if (times.first) parts.push(say("first", { seconds: ((times.first - times.begun) / 1000).toFixed(2) }));
  if (finish === "stopped") parts.push(say("stopped"));
  if (finish === "length") parts.push(say("cut"));
  return parts.join(" · ");
}

function retry() {
  if (running) return;
  messages.pop();
  views.pop().element.remove();
  answer();
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("log").setAttribute("aria-busy", String(is));
}

// What the user does

function send() {
  const text = $("text").value.trim();
  if (!text || running) return;
  messages.push({ role: "user", content: text });
  views.at(-1)?.draw(); // it is the last no more
  views.push(new View(messages.at(-1)));
  $("text").value = "";
  grow();
  answer();
}

function grow() {
  const text = $("text");
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
}

function openSettings(said = "") {
  $("settings-note").textContent = said;
  $("settings-note").hidden = !said;
  for (const name of ["system", "tools", ...OPTIONS]) $(name).value = settings[name] ?? "";
  $("key").value = key;
  $("language").value = language();
  if (!$("settings").open) $("settings").showModal();
}

// Returns what is wrong with what was entered, or "".
function wrong() {
  for (const name of OPTIONS) {
    if ($(name).value && !Number.isFinite(Number($(name).value))) return say("badNumber", { field: say(name) });
  }
  try {
    if ($("tools").value.trim() && !Array.isArray(JSON.parse($("tools").value))) return say("badTools");
  } catch {
    return say("badTools");
  }
  return "";
}

$("settings").addEventListener("submit", (event) => {
  const fault = wrong();
  if (!fault) return;
  event.preventDefault();
  $("settings-note").textContent = fault;
  $("settings-note").hidden = false;
});
$("settings").addEventListener("close", () => {
  if (wrong()) return; // left by Escape: nothing is taken
  for (const name of ["system", "tools", ...OPTIONS]) settings[name] = $(name).value.trim();
  settings.language = $("language").value;
  settings.model = $("models").value || settings.model;
  key = $("key").value.trim();
  keep(localStorage, "settings", settings);
  keep(sessionStorage, "key", key);
  translate();
  if (!running) drawAll();
  findModels();
});
$("open-settings").addEventListener("click", () => openSettings());
$("fresh").addEventListener("click", () => {
  running?.abort();
  messages = [];
  remember();
  drawAll();
  $("text").focus();
});
$("save").addEventListener("click", () => {
  const { messages: whole } = request();
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(whole, null, 2)], { type: "application/json" }));
  link.download = "chat.json";
  link.click();
  URL.revokeObjectURL(link.href);
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => running?.abort());
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", (event) => {
  // Enter that ends a word of an input method (229 in Safari) sends nothing.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
    event.preventDefault();
    send();
  }
});

translate();
drawAll();
findModels();
