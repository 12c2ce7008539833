// The playground: requests to this server, as completions or as a conversation, and what the server does now.

import { showAdapters } from "./adapters.js";
import { ALTERNATIVES, Answer, hideAlternatives, watchTokens } from "./answer.js";
import { chatBody, clear, regenerate, send } from "./chat.js";
import { loadClusters, locate, showMapError } from "./clusters.js";
import { $, chosenModels, isRunning, run, say, settings, showError, stop } from "./form.js";
import { address, call, key } from "./server.js";

const POLL_MS = 1000;

// --- the two views

const isChat = () => location.hash === "#chat";

function showView() {
  document.body.dataset.view = isChat() ? "chat" : "completion";
  document.querySelectorAll("nav a").forEach((link) => {
    if (link.hash === (isChat() ? "#chat" : "#completion")) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  });
  $("prompt").disabled = isChat(); // one that is not seen cannot be asked for
  $(isChat() ? "chat" : "form").append($("notes"));
  const limit = $("max_tokens"); // an answer ends by itself, a completion does not
  if (limit.value === (isChat() ? limit.defaultValue : "")) limit.value = isChat() ? "" : limit.defaultValue;
}

// --- completions

const completionBody = (model) =>
  ({ model, prompt: $("prompt").value, ...settings(), logprobs: ALTERNATIVES });

async function generate() {
  if (isRunning()) return;
  const models = chosenModels();
  $("second").hidden = models.length === 1;
  const prompt = $("prompt").value;
  const panels = models.map((model, i) => new Answer($(["first", "second"][i]), model, prompt));
  await run((signal) => {
    locate(prompt, models[0]).catch(showMapError);
    return panels.map((panel) => panel.read("v1/completions", completionBody(panel.model), signal));
  });
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
    showAdapters(text);
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

const requestBody = () => (isChat() ? chatBody() : completionBody($("model").value));
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function asCurl() {
  const path = isChat() ? "v1/chat/completions" : "v1/completions";
  const lines = [`curl ${quoted(address(path).href)}`, "-H 'Content-Type: application/json'"];
  if (key()) lines.push('-H "Authorization: Bearer $OPENAI_API_KEY"');
  lines.push(`-d ${quoted(JSON.stringify(requestBody()))}`);
  return lines.join(" \\\n  ");
}

const EXTRA = ["top_k", "repetition_penalty"]; // arguments that OpenAI's client does not know

function asPython() {
  const entries = Object.entries(requestBody());
  const own = entries.filter(([name]) => EXTRA.includes(name));
  const lines = entries.filter(([name]) => !EXTRA.includes(name)).map(([name, value]) => `${name}=${literal(value)}`);
  if (own.length) lines.push(`extra_body=${literal(Object.fromEntries(own))}`);
  const given = key() ? 'os.environ["OPENAI_API_KEY"]' : '"none"';
  const [create, result] = isChat() ? ["chat.completions", "message"] : ["completions", "text"];
  return [...(key() ? ["import os", ""] : []), "from openai import OpenAI", "",
    `client = OpenAI(base_url=${JSON.stringify(address("v1").href)}, api_key=${given})`,
    `completion = client.${create}.create(`, ...lines.map((each) => `    ${each},`), ")",
    `print(completion.choices[0].${result})`, ""].join("\n");
}

/** A JSON value in Python. */
function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${literal(each)}`).join(", ")}}`;
}

async function copy(write) {
  try {
    $("command").value = write();
  } catch (error) {
    return showError(error.message);
  }
  $("copied").hidden = false;
  $("command").select();
  try {
    await navigator.clipboard.writeText($("command").value);
    say("Copied.");
  } catch { // without TLS a browser keeps its clipboard to itself
    say("The command is selected: copy it with Ctrl+C.");
  }
}

// --- start

async function loadModels() {
  const models = (await (await call("v1/models")).json()).data;
  for (const [id, first] of [["model", []], ["beside", [new Option("nothing", "")]]]) {
    const chosen = $(id).value;
    $(id).replaceChildren(...first, ...models.map((model) => new Option(model.id, model.id)));
    if (models.some((model) => model.id === chosen)) $(id).value = chosen;
  }
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

$("form").addEventListener("submit", (event) => { event.preventDefault(); isChat() ? send() : generate(); });
document.querySelectorAll(".stop").forEach((button) => button.addEventListener("click", stop));
$("regenerate").addEventListener("click", regenerate);
$("clear").addEventListener("click", clear);
$("key").addEventListener("change", load);
$("curl").addEventListener("click", () => copy(asCurl));
$("python").addEventListener("click", () => copy(asPython));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.ctrlKey) $("form").requestSubmit();
  if (event.key === "Escape") { stop(); hideAlternatives(); }
});
addEventListener("hashchange", showView);
watchTokens($("outputs"));
watchTokens($("chat"));
setInterval(poll, POLL_MS);
showView();
load();
poll();
