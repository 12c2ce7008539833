// What the server has counted of each adapter: the busiest by name, and the others together.

import { $ } from "./form.js";

/** The values of a metric by adapter, of /metrics as text. */
function byAdapter(text, name) {
  const lines = text.matchAll(new RegExp(`^chameleon_adapter_${name}\\{adapter="([^"]*)"\\} (\\S+)`, "gm"));
  return new Map([...lines].map(([, adapter, value]) => [adapter, Number(value)]));
}

export function showAdapters(text) {
  const rows = byAdapter(text, "requests_total");
  const tokens = byAdapter(text, "generation_tokens_total");
  const mean = (name) => {
    const [sums, counts] = [byAdapter(text, `${name}_sum`), byAdapter(text, `${name}_count`)];
    return (adapter) => (counts.get(adapter) ? `${(1000 * sums.get(adapter) / counts.get(adapter)).toFixed(1)} ms` : "-");
  };
  const [first, queued] = [mean("time_to_first_token_seconds"), mean("request_queue_time_seconds")];
  $("adapters").hidden = !rows.size;
  const names = [...rows.keys()].sort((a, b) => rows.get(b) - rows.get(a));
  $("adapters").querySelector("tbody").replaceChildren(...names.map((adapter) => {
    const row = document.createElement("tr");
    for (const cell of [adapter, rows.get(adapter), tokens.get(adapter) ?? 0, first(adapter), queued(adapter)]) {
      row.insertCell().textContent = cell;
    }
    return row;
  }));
}
