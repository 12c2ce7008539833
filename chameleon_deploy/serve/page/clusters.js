// The map: where prompts fall among the clusters, and how far they are from each centroid.

import { fillRow } from "./answer.js";
import { $ } from "./form.js";
import { call, ServerError } from "./server.js";

const RECENT = 30; // prompts on the map
const MAP = { width: 400, height: 300, margin: 32 };

let clusters = [];
let recent = []; // of {embedding, cluster_id, distances}, the newest last

export async function locate(prompt, model) {
  const response = await call("v1/adapt", { input: prompt, model });
  const [item] = (await response.json()).data;
  recent = [...recent, item].slice(-RECENT);
  await loadClusters();
}

export async function loadClusters() {
  clusters = (await (await call("v1/clusters")).json()).data;
  drawMap();
  showDistances();
}

export function showMapError(error) {
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
