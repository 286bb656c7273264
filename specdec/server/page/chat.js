// A chat with the model behind this page. What the model says becomes text nodes, never HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const messages = [];
let model = null;
let controller = null;

function headers() {
  const key = $("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function add(parent, name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

async function refusalOf(response) {
  if (response.status === 401) $("key-label").hidden = false;
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answers ${response.status}`;
  }
}

async function learnModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await refusalOf(response));
  model = (await response.json()).data[0].id;
  $("model").textContent = model;
}

async function showLoad() {
  if (document.hidden) return;
  try {
    const response = await fetch("metrics", { headers: headers() });
    if (!response.ok) return;
    const figures = new Map();
    for (const line of (await response.text()).split("\n")) {
      const [name, value] = line.split(" ");
      if (name && value) figures.set(name, Number(value));
    }
    $("rows").textContent = figures.get("specdec_rows") ?? "-";
    $("queue").textContent = figures.get("specdec_queue_length") ?? "-";
  } catch {
    $("rows").textContent = $("queue").textContent = "-";
  }
}

// Parts of a text by who wrote them: `runs` are lengths, the model's own and drafted by turns.
// Python counts characters, JavaScript halves of them: the text is taken apart by code points.
function show(element, text, runs) {
  const points = Array.from(text);
  const total = runs.reduce((sum, length) => sum + length, 0);
  if (total !== points.length) {
    add(element, "span", "", text);
    return;
  }
  let place = 0;
  runs.forEach((length, index) => {
    if (length) add(element, "span", index % 2 ? "drafted" : "", points.slice(place, place + length).join(""));
    place += length;
  });
}

function showTree(tree) {
  const nodes = $("nodes");
  nodes.replaceChildren();
  if (!tree) {
    nodes.textContent = "nothing was drafted";
    return;
  }
  const depths = [];
  const children = new Map();
  tree.parents.forEach((parent, node) => {
    depths[node] = parent < 0 ? 0 : depths[parent] + 1;
    children.set(parent, [...(children.get(parent) ?? []), node]);
  });
  const write = (node) => {
    add(nodes, "span", "", "  ".repeat(depths[node]));
    add(nodes, "span", tree.accepted[node] ? "kept" : "", JSON.stringify(tree.texts[node]));
    add(nodes, "span", "", tree.accepted[node] ? " kept\n" : "\n");
    (children.get(node) ?? []).forEach(write);
  };
  (children.get(-1) ?? []).forEach(write);
}

// Server-sent events, each one line of JSON.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

const percent = (share) => (share === null ? "-" : `${Math.round(100 * share)}%`);

class Reply {
  constructor(speculates) {
    this.turn = add($("chat"), "div", "turn assistant");
    this.thought = add(this.turn, "div", "thought");
    this.said = add(this.turn, "div", "said");
    this.text = "";
    this.speculates = speculates;
    showTree(null);
    this.started = null;
    this.speed = null;
    this.numTimed = this.numTokens = this.numRounds = this.numDrafted = this.numAccepted = 0;
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) {
      this.finish(chunk.usage, chunk.speculation);
      return;
    }
    const delta = chunk.choices[0].delta;
    const runs = chunk.speculation?.runs ?? [];
    const isAtEnd = $("chat").scrollHeight - $("chat").scrollTop - $("chat").clientHeight < 40;
    if (delta.reasoning_content) show(this.thought, delta.reasoning_content, runs);
    if (delta.content) {
      show(this.said, delta.content, runs);
      this.text += delta.content;
    }
    if (chunk.speculation) {
      if (chunk.speculation.tree) showTree(chunk.speculation.tree);
      this.measure(chunk.speculation);
    }
    if (isAtEnd) $("chat").scrollTop = $("chat").scrollHeight;
  }

  // The first part starts the clock: its tokens do not count for the speed.
  measure(part) {
    const now = performance.now();
    if (this.started === null) this.started = now;
    else this.numTimed += part.num_tokens;
    this.numTokens += part.num_tokens;
    this.numRounds += part.num_rounds;
    this.numDrafted += part.num_draft_tokens;
    this.numAccepted += part.num_accepted_tokens;
    const seconds = (now - this.started) / 1000;
    this.speed = seconds > 0 && this.numTimed ? this.numTimed / seconds : null;
    $("speed").textContent = this.speed === null ? "-" : this.speed.toFixed(1);
    $("acceptance").textContent = percent(this.numDrafted ? this.numAccepted / this.numDrafted : null);
    $("length").textContent = this.numRounds ? (this.numTokens / this.numRounds).toFixed(2) : "-";
  }

  finish(usage, speculation) {
    const kind = this.speculates ? "speculation on" : "speculation off";
    const rate = this.speed === null ? "" : `, ${this.speed.toFixed(1)} tokens/s`;
    const kept = speculation.num_draft_tokens
      ? `, ${speculation.num_accepted_tokens} of ${speculation.num_draft_tokens} drafted kept`
      : "";
    add(this.turn, "div", "note", `${kind}: ${usage.completion_tokens} tokens${rate}${kept}`);
  }
}

async function answer() {
  const speculates = $("speculation").checked;
  if (model === null) await learnModel();
  controller = new AbortController();
  const body = {
    model,
    messages,
    stream: true,
    stream_options: { include_usage: true, include_speculation: true },
    speculation: speculates,
    ...($("sample").checked ? {} : { temperature: 0 }),
  };
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify(body),
    signal: controller.signal,
  });
  if (!response.ok) throw new Error(await refusalOf(response));
  const reply = new Reply(speculates);
  try {
    for await (const chunk of eventsOf(response)) reply.take(chunk);
  } finally {
    if (reply.text) messages.push({ role: "assistant", content: reply.text });
    else reply.turn.remove();
  }
  if (!reply.text) throw new Error("the model said nothing");
}

async function send(event) {
  event.preventDefault();
  const text = $("message").value.trim();
  if (!text || controller) return;
  complain("");
  $("message").value = "";
  messages.push({ role: "user", content: text });
  const turn = add($("chat"), "div", "turn user", text);
  $("chat").scrollTop = $("chat").scrollHeight;
  $("send").hidden = true;
  $("stop").hidden = false;
  $("clear").disabled = true;
  try {
    await answer();
  } catch (error) {
    if (error.name !== "AbortError") complain(error.message);
    if (messages.at(-1).role === "user") {
      messages.pop();
      turn.remove();
      $("message").value = text;
    }
  } finally {
    controller = null;
    $("send").hidden = false;
    $("stop").hidden = true;
    $("clear").disabled = false;
    $("message").focus();
    showLoad();
  }
}

$("form").addEventListener("submit", send);
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) $("form").requestSubmit(), event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") controller?.abort();
});
$("stop").addEventListener("click", () => controller?.abort());
$("clear").addEventListener("click", () => {
  messages.length = 0;
  $("chat").replaceChildren();
  complain("");
  $("message").focus();
});
$("tint").addEventListener("change", () => $("chat").classList.toggle("tinted", $("tint").checked));
$("show-tree").addEventListener("change", () => ($("tree").hidden = !$("show-tree").checked));
$("key").addEventListener("change", () => learnModel().then(() => complain(""), (error) => complain(error.message)));
$("chat").classList.add("tinted");
learnModel().catch((error) => complain(error.message));
setInterval(showLoad, 1000);
showLoad();
