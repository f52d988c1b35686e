// A message on the page, drawn again as it grows.
"use strict";

function button(word, act) {
  const made = make("button", say(word), "small");
  made.type = "button";
  made.addEventListener("click", () => act(made));
  return made;
}

function copier(text) {
  if (!navigator.clipboard) return []; // there is none but by HTTPS or on this machine
  return [button("copy", async (made) => {
    await navigator.clipboard.writeText(text());
    made.textContent = say("copied");
    setTimeout(() => { made.textContent = say("copy"); }, 1500);
  })];
}

class View {
  constructor(message) {
    this.message = message;
    this.body = make("div", null, "body");
    this.foot = make("div", null, "foot");
    this.element = make("article", [this.body, this.foot], message.role);
    this.element.setAttribute("aria-label", say(message.role === "user" ? "you" : "it"));
    if (message.role === "assistant") {
      this.thoughts = make("div");
      this.summary = make("summary");
      this.details = make("details", [this.summary, this.thoughts]);
      this.calls = make("div");
      this.element.insertBefore(this.details, this.body);
      this.element.insertBefore(this.calls, this.foot);
    } else {
      this.body.textContent = message.content;
    }
    $("log").append(this.element);
    this.draw();
  }

  draw() {
    const { message } = this;
    if (message.role !== "assistant") return;
    const thought = message.reasoning_content ?? "";
    this.details.hidden = !thought;
    const goesOn = running !== null && message === messages.at(-1);
    this.summary.textContent = say(goesOn && !message.content ? "thinking" : "thought");
    if (this.thoughts.textContent !== thought) this.thoughts.textContent = thought;
    Markdown.show(this.body, message.content ?? "", (made) => {
      for (const head of made.querySelectorAll(".code-head")) {
        head.append(...copier(() => head.nextSibling.textContent));
      }
    });
    this.drawCalls(goesOn);
    if (!goesOn) this.drawFoot();
  }

  drawCalls(goesOn) {
    const calls = this.message.tool_calls ?? [];
    calls.forEach((call, index) => {
      let box = this.calls.children[index];
      if (!box) {
        const result = make("textarea");
        result.rows = 2;
        result.value = call.result ?? "";
        result.addEventListener("input", () => { call.result = result.value; remember(); });
        const label = make("label", [make("span", say("result")), result]);
        box = make("div", [make("div", null, "name"), make("pre", [make("code")]), label], "call");
        this.calls.append(box);
      }
      box.children[0].textContent = `${say("call")}: ${call.function.name}`;
      box.children[1].firstChild.textContent = pretty(call.function.arguments);
      box.children[2].hidden = goesOn;
    });
  }

  drawFoot() {
    const { message } = this;
    const isLast = message === messages.at(-1);
    const parts = message.note ? [make("span", message.note, "note")] : [];
    if (message.fault) parts.push(make("span", message.fault, "fault"));
    if (message.content) parts.push(...copier(() => message.content));
    if (isLast) parts.push(button("retry", retry));
    if (isLast && message.tool_calls?.length) parts.push(button("sendResults", answer));
    this.foot.replaceChildren(...parts);
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // not whole yet, or no JSON
  }
}
