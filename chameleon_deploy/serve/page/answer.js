// What a model writes: its tokens as they come, each coloured by its probability, and their alternatives.

import { $ } from "./form.js";
import { call, events } from "./server.js";

export const ALTERNATIVES = 5;
const LEVELS = [0.9, 0.5, 0.2, 0.05, 0.007].map(Math.log); // the least log-probability of each colour but the last

/** A completion, or the answer to a conversation. */
export class Answer {
  /** root: has a title, a line about it, and room for a text */
  constructor(root, model, prompt = "") {
    this.model = model;
    this.content = ""; // without tool calls
    this.calls = []; // tool calls, each with the field of its result
    this.about = root.querySelector(".about");
    this.text = root.querySelector(".text");
    root.querySelector(".title").textContent = model;
    this.text.replaceChildren();
    if (prompt) this.text.append(span("prompt", prompt));
    this.list = null; // of tokens, a list box with its first token
    this.pending = []; // tokens whose text has not come yet: parts of a character, of a stop string, or of a call
    this.count = 0;
    this.cached = 0; // tokens of the prompt that were found in the prefix cache
    this.adaptation = null;
    this.describe("waiting");
  }

  async read(path, body, signal) {
    try {
      const response = await call(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
      this.begun = performance.now();
      let reason = null;
      for await (const event of events(response)) {
        const choice = event.choices[0];
        if (!choice) {
          this.cached = event.usage?.prompt_tokens_details?.cached_tokens ?? 0;
          this.describe(reason);
          continue;
        }
        reason = choice.finish_reason ?? reason;
        this.adaptation = choice.chameleon ?? this.adaptation;
        const tokens = tokensOf(choice.logprobs);
        this.count += tokens.length;
        this.pending.push(...tokens);
        this.add(choice.delta ? choice.delta.content : choice.text);
        for (const each of choice.delta?.tool_calls ?? []) this.addCall(each);
        this.describe(reason ?? "generating");
      }
      if (this.pending.length) this.show("∎", this.text);
    } catch (error) {
      this.describe(error.name === "AbortError" ? "stopped" : "failed");
      throw error;
    }
  }

  add(text) {
    if (!text) return;
    this.content += text;
    this.show(text, this.text);
  }

  /** The pending tokens are those of the call: each is shown by its own text. */
  addCall({ id, function: { name, arguments: given } }) {
    const root = $("call").content.cloneNode(true).firstElementChild;
    root.querySelector(".called").textContent = `${name}(${given})`;
    this.text.append(root);
    this.list = null;
    const tokens = this.pending;
    for (const token of tokens) {
      this.pending = [token];
      this.show(token.text, root.querySelector(".written"));
    }
    this.list = null;
    this.calls.push({ id, name, arguments: given, result: root.querySelector(".result") });
  }

  /** Show a text, and keep the pending tokens as its tokens. */
  show(text, parent) {
    if (!this.list) {
      this.list = span("tokens");
      this.list.setAttribute("role", "listbox");
      this.list.setAttribute("aria-label", `Tokens of ${this.model}`);
      this.list.setAttribute("aria-orientation", "horizontal");
      parent.append(this.list);
    }
    const token = span("token", text);
    token.tabIndex = this.list.childElementCount ? -1 : 0;
    token.setAttribute("role", "option");
    token.setAttribute("aria-selected", "false");
    token.alternatives = this.pending;
    const logprob = Math.min(...this.pending.map((each) => each.logprob));
    token.setAttribute("aria-label", `${visible(text)} ${this.pending.length ? percent(logprob) : ""}`);
    if (this.pending.length) token.dataset.level = level(logprob);
    this.pending = [];
    this.list.append(token);
  }

  describe(state) {
    const seconds = (performance.now() - this.begun) / 1000;
    const where = this.adaptation?.cluster_id >= 0 ? `cluster ${this.adaptation.cluster_id}` : "";
    const cohort = this.adaptation?.cohort ? `cohort ${this.adaptation.cohort.id} of ${this.adaptation.cohort.size}` : "";
    const speed = this.count > 1 ? `${this.count} tokens, ${(this.count / seconds).toFixed(1)} tokens/s` : "";
    const cached = this.cached ? `${this.cached} tokens cached` : "";
    this.about.textContent = [where, cohort, cached, speed, state].filter(Boolean).join(" · ");
  }
}

/** The tokens of a completion's or of a conversation's log-probabilities. */
function tokensOf(logprobs) {
  if (logprobs?.content) {
    return logprobs.content.map(({ token, logprob, top_logprobs }) =>
      ({ text: token, logprob, top: top_logprobs.map((each) => [each.token, each.logprob]) }));
  }
  return (logprobs?.tokens ?? []).map((text, i) => ({
    text, logprob: logprobs.token_logprobs[i] ?? 0, top: Object.entries(logprobs.top_logprobs?.[i] ?? {}),
  }));
}

const span = (className, textContent = "") => Object.assign(document.createElement("span"), { className, textContent });
const level = (logprob) => LEVELS.filter((least) => logprob < least).length;

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return `${share >= 10 ? share.toFixed(0) : share.toPrecision(2)} %`;
}

const visible = (text) => text.replace(/^ | $/g, "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");

// --- the alternatives of a token

function showAlternatives(token) {
  const box = $("alternatives");
  box.replaceChildren(...token.alternatives.map(alternativesTable));
  if (!token.alternatives.length) return hideAlternatives();
  box.hidden = false;
  token.setAttribute("aria-describedby", box.id);
  const place = token.getClientRects()[0];
  box.style.left = `${Math.max(4, Math.min(place.left, innerWidth - box.offsetWidth - 4))}px`;
  const below = place.bottom + 6;
  box.style.top = `${below + box.offsetHeight < innerHeight ? below : Math.max(4, place.top - box.offsetHeight - 6)}px`;
}

export function hideAlternatives() {
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

export function fillRow(row, cells, chosen) {
  row.classList.toggle("chosen", chosen);
  for (const cell of cells) row.insertCell().textContent = cell;
}

const MOVES = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };

function moveFocus(event) {
  const token = event.target.closest("[role=option]");
  if (!token || !(event.key in MOVES)) return;
  event.preventDefault();
  const all = [...token.parentElement.children];
  const next = all[Math.max(0, Math.min(all.indexOf(token) + MOVES[event.key], all.length - 1))];
  token.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

/** Show the alternatives of the tokens below an element, by pointer and by keys. */
export function watchTokens(root) {
  root.addEventListener("keydown", moveFocus);
  for (const [kind, handle] of [["pointerover", showAlternatives], ["focusin", showAlternatives],
    ["pointerout", hideAlternatives], ["focusout", hideAlternatives]]) {
    root.addEventListener(kind, (event) => {
      const token = event.target.closest("[role=option]");
      if (token) handle(token);
    });
  }
}
