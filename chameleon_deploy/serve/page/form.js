// The form that completions and conversations share: its settings, one run at a time, and what is said of it.

import { ServerError } from "./server.js";

const NUMBERS = ["max_tokens", "temperature", "top_p", "seed", "top_k", "repetition_penalty", "presence_penalty",
  "frequency_penalty"];

export const $ = (id) => document.getElementById(id);

let running = null; // AbortController of the streams that are being read

export function settings() {
  const found = {};
  for (const name of NUMBERS) if ($(name).value !== "") found[name] = $(name).valueAsNumber;
  const stop = $("stop").value.split("\n").filter(Boolean);
  if (stop.length) found.stop = stop;
  return found;
}

/** The model, and the one beside it if any. */
export const chosenModels = () => [$("model").value, $("beside").value].filter(Boolean);

export const isRunning = () => running !== null;
export const stop = () => running?.abort();

/** Do some work to its end, or until it is stopped. `begin` takes a signal and returns promises. */
export async function run(begin) {
  const controller = running = new AbortController();
  showError();
  setBusy(true);
  const ends = await Promise.allSettled(begin(controller.signal));
  const failed = ends.filter((end) => end.status === "rejected" && end.reason.name !== "AbortError");
  failed.forEach((end) => end.reason instanceof ServerError || console.error(end.reason));
  showError([...new Set(failed.map((end) => end.reason.message))].join(" "));
  running = null;
  setBusy(false);
  say(failed.length ? "Failed." : controller.signal.aborted ? "Stopped." : "Done.");
}

function setBusy(busy) {
  document.body.classList.toggle("busy", busy);
  document.querySelectorAll(".begin").forEach((each) => { each.disabled = busy; });
  document.querySelectorAll(".stop").forEach((each) => { each.disabled = !busy; });
  if (busy) say("Generating…");
}

export function say(text) {
  $("status").textContent = text;
}

export function showError(text = "") {
  $("error").textContent = text;
  $("error").hidden = !text;
}
