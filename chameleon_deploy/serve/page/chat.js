// A conversation: turns that all models share, and the answers of each model beside each other.

import { ALTERNATIVES, Answer } from "./answer.js";
import { $, chosenModels, isRunning, run, say, settings, showError } from "./form.js";

// Of {text, element} of the user, or {answers, element}: one answer per model, null where a model had nothing to answer.
let turns = [];
let edited = null; // the user's turn that the next message replaces, with all that follow

/** The conversation so far as one model knows it: with its own answers, or the first model's where it has none. */
function messagesFor(column) {
  const messages = $("system").value ? [{ role: "system", content: $("system").value }] : [];
  for (const { text, answers } of turns) {
    if (text !== undefined) messages.push({ role: "user", content: text });
    else messages.push(...asMessages(column < answers.length ? answers[column] : answers[0]));
  }
  return messages;
}

/** An answer with the results of its calls; nothing for one that failed before its first token. */
function asMessages(answer) {
  if (!answer || !(answer.content || answer.calls.length)) return [];
  const message = { role: "assistant", content: answer.content };
  if (!answer.calls.length) return [message];
  message.tool_calls = answer.calls.map(({ id, name, arguments: given }) =>
    ({ id, type: "function", function: { name, arguments: given } }));
  return [message, ...answer.calls.map(({ id, result }) => ({ role: "tool", tool_call_id: id, content: result.value }))];
}

/** The fields of a request beside its messages. Throws an Error for tools or a schema that are not JSON. */
function fields() {
  const found = { ...settings(), logprobs: true, top_logprobs: ALTERNATIVES };
  const tools = parsed("tools");
  if (tools) Object.assign(found, { tools, tool_choice: $("tool_choice").value });
  const schema = parsed("schema");
  if (schema) found.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  return found;
}

function parsed(id) {
  const text = $(id).value.trim();
  if (!text) return undefined;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`The ${id} field is not JSON: ${error.message}`);
  }
}

/** What would be sent now. */
export function chatBody() {
  const message = $("message").value ? [{ role: "user", content: $("message").value }] : [];
  return { model: $("model").value, messages: [...messagesFor(0), ...message], ...fields() };
}

/** Send the message, or the results of the calls. */
export async function send() {
  await ask(() => {
    if (edited) cutFrom(turns.indexOf(edited));
    if ($("message").value) addUserTurn($("message").value);
    $("message").value = "";
  });
}

/** Ask for the last answers again, with the next seed. */
export async function regenerate() {
  await ask(() => {
    if (!turns.at(-1)?.answers) return;
    cutFrom(turns.length - 1);
    $("seed").value = $("seed").valueAsNumber + 1;
  });
}

export function clear() {
  if (isRunning()) return;
  cutFrom(0);
  showError();
  say("");
  $("message").focus();
}

/** Change the conversation, and ask every model that has something to answer. */
async function ask(change) {
  if (isRunning() || !$("form").reportValidity()) return;
  try {
    fields();
  } catch (error) {
    return showError(error.message);
  }
  change();
  const request = fields(); // its seed may be another
  const conversations = chosenModels().map((_, column) => messagesFor(column));
  const isAsked = conversations.map((messages) => ["user", "tool"].includes(messages.at(-1)?.role));
  if (!isAsked.includes(true)) return say("Write a message.");
  const element = Object.assign(document.createElement("div"), { className: "answers" });
  $("turns").append(element);
  const answers = chosenModels().map((model, column) => (isAsked[column] ? addAnswer(element, model) : null));
  turns.push({ answers, element });
  scroll();
  await run((signal) => answers.flatMap((answer, column) => answer ?
    [answer.read("v1/chat/completions", { model: answer.model, messages: conversations[column], ...request }, signal)] : []));
  if (answers.some((answer) => answer?.calls.length)) say("Write the results of the calls, then send.");
  scroll();
}

function addAnswer(parent, model) {
  const root = $("answer").content.cloneNode(true).firstElementChild;
  parent.append(root);
  return new Answer(root, model);
}

function addUserTurn(text) {
  const element = $("user-turn").content.cloneNode(true).firstElementChild;
  const turn = { text, element };
  element.querySelector(".text").textContent = text;
  element.querySelector(".edit").addEventListener("click", () => edit(edited === turn ? null : turn));
  turns.push(turn);
  $("turns").append(element);
}

/** Put a turn into the message's field; what its replacement will drop is greyed. null gives that up. */
function edit(turn) {
  $("message").value = turn ? turn.text : "";
  edited = turn;
  markEdited();
  $("message").focus();
}

function markEdited() {
  const from = edited ? turns.indexOf(edited) : turns.length;
  turns.forEach(({ element }, i) => element.classList.toggle("replaced", i >= from));
}

function cutFrom(index) {
  turns.splice(index).forEach(({ element }) => element.remove());
  edited = null;
  markEdited();
}

function scroll() {
  $("turns").scrollTop = $("turns").scrollHeight;
}
