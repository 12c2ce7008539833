// The playground: requests to this server, their tokens as they come, and where prompts fall among the clusters.

const NUMBERS = ["max_tokens", "temperature", "top_p", "seed", "top_k", "repetition_penalty", "presence_penalty",
  "frequency_penalty"];
const ALTERNATIVES = 5;
const LEVELS = [0.9, 0.5, 0.2, 0.05, 0.007].map(Math.log); // the least log-probability of each colour but the last
const RECENT = 30; // prompts on the map
const POLL_MS = 1000;
const MAP = { width: 400, height: 300, margin: 32 };

const $ = (id) => document.getElementById(id);
const base = new URL(".", location.href);

let models = [];
let clusters = [];
let recent = []; // of {embedding, cluster_id, distances}, the newest last
let running = null; // AbortController of the streams that are being read

// --- talking to the server

class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function call(path, body, signal) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  let response;
  try {
    response = await fetch(new URL(path, base),
      { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const text = await response.text();
  try {
    return serverError(JSON.parse(text).error, response.status);
  } catch {
    return new ServerError(`status ${response.status}: ${text.slice(0, 300)}`, response.status);
  }
}

const serverError = (error, status) =>
  new ServerError([status, error.code, error.message].filter(Boolean).join(": "), status);

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ServerError("The stream ended early.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw serverError(event.error);
      yield event;
    }
  }
}

// --- the request

function requestBody(model) {
  const body = { model, prompt: $("prompt").value };
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = $(name).valueAsNumber;
  const stop = $("stop").value.split("\n").filter(Boolean);
  if (stop.length) body.stop = stop;
  body.logprobs = ALTERNATIVES;
  return body;
}

const isBase = (id) => models.find((model) => model.id === id)?.mode === "none" || id.endsWith(":none");

/** What is shown beside a model: the base, or beside the base the first model that adapts. */
function counterpart(id) {
  return models.find((model) => isBase(model.id) !== isBase(id))?.id;
}

async function generate() {
  if (running) return;
  const controller = running = new AbortController();
  const chosen = $("model").value;
  const other = $("compare").checked ? counterpart(chosen) : undefined;
  const panels = [new Panel($("first"), chosen)];
  $("second").hidden = other === undefined;
  if (other !== undefined) panels.push(new Panel($("second"), other));
  showError();
  setBusy(true);
  const prompt = $("prompt").value;
  const work = panels.map((panel) => panel.run(controller.signal));
  locate(prompt, chosen).catch(showMapError);
  const ends = await Promise.allSettled(work);
  const failed = ends.filter((end) => end.status === "rejected" && end.reason.name !== "AbortError");
  failed.forEach((end) => end.reason instanceof ServerError || console.error(end.reason));
  showError([...new Set(failed.map((end) => end.reason.message))].join(" "));
  setBusy(false);
  const stopped = controller.signal.aborted;
  running = null;
  say(failed.length ? "Failed." : stopped ? "Stopped." : "Done.");
}

function setBusy(busy) {
  $("generate").disabled = busy;
  $("cancel").disabled = !busy;
  $("outputs").classList.toggle("busy", busy);
  if (busy) say("Generating…");
}

function say(text) {
  $("status").textContent = text;
}

function showError(text = "") {
  $("error").textContent = text;
  $("error").hidden = !text;
}

// --- one completion

class Panel {
  constructor(root, model) {
    this.model = model;
    this.about = root.querySelector(".about");
    this.text = root.querySelector(".text");
    root.querySelector(".title").textContent = model;
    this.text.replaceChildren(Object.assign(document.createElement("span"),
      { className: "prompt", textContent: $("prompt").value }));
    this.tokens = document.createElement("span"); // becomes a list box with its first token
    this.text.append(this.tokens);
    this.pending = []; // tokens whose text has not come yet: parts of a character, or of a stop string
    this.count = 0;
    this.adaptation = null;
    this.describe("waiting");
  }

  async run(signal) {
    try {
      const body = { ...requestBody(this.model), stream: true };
      const response = await call("v1/completions", body, signal);
      this.begun = performance.now();
      let reason = null;
      for await (const event of events(response)) {
        const choice = event.choices[0];
        if (!choice) continue;
        reason = choice.finish_reason ?? reason;
        this.adaptation = choice.chameleon ?? this.adaptation;
        this.add(choice.text, tokensOf(choice.logprobs));
        this.describe(reason ?? "generating");
      }
      if (this.pending.length) this.add("∎", []);
    } catch (error) {
      this.describe(error.name === "AbortError" ? "stopped" : "failed");
      throw error;
    }
  }

  add(text, tokens) {
    this.count += tokens.length;
    this.pending.push(...tokens);
    if (!text) return;
    if (!this.tokens.hasAttribute("role")) {
      this.tokens.setAttribute("role", "listbox");
      this.tokens.setAttribute("aria-label", `Tokens of ${this.model}`);
      this.tokens.setAttribute("aria-orientation", "horizontal");
    }
    const span = document.createElement("span");
    span.className = "token";
    span.textContent = text;
    span.tabIndex = this.tokens.childElementCount ? -1 : 0;
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    span.alternatives = this.pending;
    const logprob = Math.min(...this.pending.map((token) => token.logprob));
    span.setAttribute("aria-label", `${visible(text)} ${this.pending.length ? percent(logprob) : ""}`);
    if (this.pending.length) span.dataset.level = level(logprob);
    this.pending = [];
    this.tokens.append(span);
  }

  describe(state) {
    const seconds = (performance.now() - this.begun) / 1000;
    const where = this.adaptation?.cluster_id >= 0 ? `cluster ${this.adaptation.cluster_id}` : "";
    const cohort = this.adaptation?.cohort ? `cohort ${this.adaptation.cohort.id} of ${this.adaptation.cohort.size}` : "";
    const speed = this.count > 1 ? `${this.count} tokens, ${(this.count / seconds).toFixed(1)} tokens/s` : "";
    this.about.textContent = [where, cohort, speed, state].filter(Boolean).join(" · ");
  }
}

function tokensOf(logprobs) {
  return (logprobs?.tokens ?? []).map((text, i) => ({
    text, logprob: logprobs.token_logprobs[i] ?? 0, top: Object.entries(logprobs.top_logprobs?.[i] ?? {}),
  }));
}

const level = (logprob) => LEVELS.filter((least) => logprob < least).length;

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return `${share >= 10 ? share.toFixed(0) : share.toPrecision(2)} %`;
}

const visible = (text) => text.replace(/^ | $/g, "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");

// --- the alternatives of a token

function showAlternatives(span) {
  const box = $("alternatives");
  box.replaceChildren(...span.alternatives.map(alternativesTable));
  if (!span.alternatives.length) return hideAlternatives();
  box.hidden = false;
  span.setAttribute("aria-describedby", box.id);
  const place = span.getClientRects()[0];
  box.style.left = `${Math.max(4, Math.min(place.left, innerWidth - box.offsetWidth - 4))}px`;
  const below = place.bottom + 6;
  box.style.top = `${below + box.offsetHeight < innerHeight ? below : Math.max(4, place.top - box.offsetHeight - 6)}px`;
}

function hideAlternatives() {
  $("alternatives").hidden = true;
  document.querySelectorAll("[aria-describedby=alternatives]").forEach((e) => e.removeAttribute("aria-describedby"));
}

function alternativesTable({ text, logprob, top }) {
  const table = document.createElement("table");
  table.createCaption().textContent = `${visible(text)} ${percent(logprob)}`;
  for (const [name, value] of top.sort((a, b) => b[1] - a[1]).slice(0, ALTERNATIVES)) {
    fillRow(table.insertRow(), [visible(name), percent(value)], name === text);
  }
  return table;
}

function fillRow(row, cells, chosen) {
  row.classList.toggle("chosen", chosen);
  for (const cell of cells) row.insertCell().textContent = cell;
}

const MOVES = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };

function moveFocus(event) {
  const span = event.target.closest("[role=option]");
  if (!span || !(event.key in MOVES)) return;
  event.preventDefault();
  const all = [...span.parentElement.children];
  const next = all[Math.max(0, Math.min(all.indexOf(span) + MOVES[event.key], all.length - 1))];
  span.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

// --- the map

async function locate(prompt, model) {
  const response = await call("v1/adapt", { input: prompt, model });
  const [item] = (await response.json()).data;
  recent = [...recent, item].slice(-RECENT);
  await loadClusters();
}

async function loadClusters() {
  clusters = (await (await call("v1/clusters")).json()).data;
  drawMap();
  showDistances();
}

function showMapError(error) {
  if (!(error instanceof ServerError)) console.error(error);
  $("clusters-about").textContent = `No map: ${error.message}`;
}

/** The first two principal components of some points, by power iteration on the matrix of their inner products. */
export function project(points) {
  const mean = points[0].map((_, j) => points.reduce((sum, point) => sum + point[j], 0) / points.length);
  const centred = points.map((point) => point.map((value, j) => value - mean[j]));
  const dot = (a, b) => a.reduce((sum, value, j) => sum + value * b[j], 0);
  const gram = centred.map((a) => centred.map((b) => dot(a, b)));
  const axes = [];
  for (let axis = 0; axis < 2; axis++) {
    let vector = points.map((_, i) => Math.cos(i + axis + 1));
    for (let step = 0; step < 200; step++) {
      vector = gram.map((row) => dot(row, vector));
      for (const other of axes) {
        const along = dot(vector, other.vector);
        vector = vector.map((value, i) => value - along * other.vector[i]);
      }
      const length = Math.hypot(...vector) || 1;
      vector = vector.map((value) => value / length);
    }
    const variance = Math.max(0, dot(vector, gram.map((row) => dot(row, vector))));
    axes.push({ vector, scale: Math.sqrt(variance) });
  }
  return points.map((_, i) => axes.map(({ vector, scale }) => vector[i] * scale));
}

function drawMap() {
  const points = [...clusters.map((cluster) => cluster.centroid), ...recent.map((item) => item.embedding)];
  if (!points.length) return $("map").replaceChildren();
  const places = toPixels(project(points));
  const now = recent.at(-1);
  const shapes = [];
  if (now) shapes.push(line(places.at(-1), places[clusters.findIndex((cluster) => cluster.id === now.cluster_id)]));
  clusters.forEach((cluster, i) => {
    const chosen = cluster.id === now?.cluster_id ? " chosen" : "";
    const radius = 7 + 2 * Math.log1p(cluster.size);
    shapes.push(circle(places[i], Math.min(radius, 20), `centroid${chosen}`, `cluster ${cluster.id}`),
      shape("text", { x: places[i][0], y: places[i][1] + 4 }, String(cluster.id)));
  });
  recent.forEach((item, i) => shapes.push(circle(places[clusters.length + i], 4,
    `prompt${item === now ? " now" : ""}`, `prompt in cluster ${item.cluster_id}`)));
  $("map").replaceChildren(...shapes.filter(Boolean));
  $("map").setAttribute("aria-label", `Map of ${clusters.length} centroids and ${recent.length} recent prompts` +
    (now ? `; the last prompt falls into cluster ${now.cluster_id}` : ""));
}

/** Both axes have one scale, so that distances can be compared. */
function toPixels(places) {
  const ranges = [0, 1].map((axis) => places.map((place) => place[axis]))
    .map((values) => [Math.min(...values), Math.max(...values)]);
  const sizes = [MAP.width, MAP.height];
  const scale = Math.min(...ranges.map(([low, high], i) => (sizes[i] - 2 * MAP.margin) / (high - low || 1)));
  return places.map((place) => place.map((value, i) =>
    sizes[i] / 2 + scale * (value - (ranges[i][0] + ranges[i][1]) / 2)));
}

function shape(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function circle([cx, cy], r, kind, title) {
  const element = shape("circle", { cx, cy, r, class: kind });
  element.append(shape("title", {}, title));
  return element;
}

const line = ([x1, y1], to) => to && shape("line", { x1, y1, x2: to[0], y2: to[1] });

function showDistances() {
  const now = recent.at(-1);
  const rows = clusters.map((cluster, i) => ({ ...cluster, distance: now?.distances[i] }));
  if (now) rows.sort((a, b) => a.distance - b.distance);
  const body = $("distances").tBodies[0];
  body.replaceChildren();
  for (const { id, size, distance } of rows) {
    fillRow(body.insertRow(), [id, distance?.toFixed(4) ?? "-", size], id === now?.cluster_id);
  }
}

// --- the server now

let counted = null; // tokens that the server had generated, and when

async function poll() {
  if (document.hidden) return;
  try {
    const text = await (await call("metrics")).text();
    const value = (name) => {
      const lines = [...text.matchAll(new RegExp(`^chameleon_${name}(?:\\{[^}]*\\})? (\\S+)`, "gm"))];
      return lines.length ? lines.reduce((sum, found) => sum + Number(found[1]), 0) : NaN;
    };
    const now = { tokens: value("generation_tokens_total"), at: performance.now() };
    const rate = counted ? 1000 * (now.tokens - counted.tokens) / (now.at - counted.at) : NaN;
    counted = now;
    showLive(value("num_requests_running"), value("num_requests_waiting"), rate);
  } catch {
    showLive(NaN, NaN, NaN);
  }
}

function showLive(...values) {
  ["live-rows", "live-queue", "live-tokens"].forEach((id, i) => {
    $(id).textContent = Number.isFinite(values[i]) ? String(Math.round(values[i])) : "-";
  });
}

// --- the request as a command

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function asCurl() {
  const lines = [`curl ${quoted(new URL("v1/completions", base).href)}`, "-H 'Content-Type: application/json'"];
  if ($("key").value) lines.push('-H "Authorization: Bearer $OPENAI_API_KEY"');
  lines.push(`-d ${quoted(JSON.stringify(requestBody($("model").value)))}`);
  return lines.join(" \\\n  ");
}

const EXTRA = ["top_k", "repetition_penalty"]; // arguments that OpenAI's client does not know

function asPython() {
  const entries = Object.entries(requestBody($("model").value));
  const own = entries.filter(([name]) => EXTRA.includes(name));
  const lines = entries.filter(([name]) => !EXTRA.includes(name)).map(([name, value]) => `${name}=${JSON.stringify(value)}`);
  if (own.length) lines.push(`extra_body=${JSON.stringify(Object.fromEntries(own))}`);
  const key = $("key").value ? 'os.environ["OPENAI_API_KEY"]' : '"none"';
  return [...($("key").value ? ["import os", ""] : []), "from openai import OpenAI", "",
    `client = OpenAI(base_url=${JSON.stringify(new URL("v1", base).href)}, api_key=${key})`,
    "completion = client.completions.create(", ...lines.map((each) => `    ${each},`), ")",
    "print(completion.choices[0].text)", ""].join("\n");
}

async function copy(text) {
  $("copied").hidden = false;
  $("command").value = text;
  $("command").select();
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch { // without TLS a browser keeps its clipboard to itself
    say("The command is selected: copy it with Ctrl+C.");
  }
}

// --- start

async function loadModels() {
  models = (await (await call("v1/models")).json()).data;
  const chosen = $("model").value;
  $("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
  if (models.some((model) => model.id === chosen)) $("model").value = chosen;
  nameCounterpart();
}

function nameCounterpart() {
  const other = counterpart($("model").value);
  $("compare").disabled = other === undefined;
  $("compare-label").textContent = other === undefined ? "Base beside it" : `${other} beside it`;
}

async function load() {
  try {
    await loadModels();
    showError();
  } catch (error) {
    if (error.status === 401) $("more").open = true; // the key is asked for there
    return showError(error.message);
  }
  await loadClusters().catch(showMapError);
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); generate(); });
$("cancel").addEventListener("click", () => running?.abort());
$("model").addEventListener("change", nameCounterpart);
$("key").addEventListener("change", load);
$("curl").addEventListener("click", () => copy(asCurl()));
$("python").addEventListener("click", () => copy(asPython()));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.ctrlKey) $("form").requestSubmit();
  if (event.key === "Escape") { running?.abort(); hideAlternatives(); }
});
$("outputs").addEventListener("keydown", moveFocus);
for (const [kind, handle] of [["pointerover", showAlternatives], ["focusin", showAlternatives],
  ["pointerout", hideAlternatives], ["focusout", hideAlternatives]]) {
  $("outputs").addEventListener(kind, (event) => {
    const span = event.target.closest("[role=option]");
    if (span) handle(span);
  });
}
setInterval(poll, POLL_MS);
load();
poll();
