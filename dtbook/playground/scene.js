// Scenes as plain data: what a link, a preset and the notebook's `scene` argument hold, and how all of them are checked.
//
// { model, agent: [x, y], direction: "east", obstacles: [[x, y], …], t, rtg, random, acting, preference,
//   parts: { "L0H1": "zero", … }, steer: { direction, at, amount }, source: { agent, direction, obstacles, t, rtg } }
// Only agent, direction and obstacles must be there; steer and source may be null. scenes.py holds what Python is given to the same.

import { DIRECTIONS, PlaygroundError, SITES, editable, isNeuron } from "./engine.js";
import { COMPASS, EMPTY, at, most, roomAt, xy } from "./game.js";

export const PREFERENCES = { "F-R": "forward − right", "F-L": "forward − left", "R-L": "right − left", F: "forward", R: "right", L: "left" };
export const ACTING = ["greedy", "sampled"];

function refuse(name, value, allowed) {
  const shown = JSON.stringify(value) ?? "missing";
  throw new PlaygroundError(`This scene cannot be shown: its ${name} is ${shown.length > 60 ? shown.slice(0, 60) + "…" : shown}; it must be ${allowed}.`);
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

function cell(task, name, value) {
  const last = task.size - 2, whole = Array.isArray(value) && value.length === 2 && value.every(Number.isInteger);
  if (!whole || roomAt(task, ...value) !== EMPTY) refuse(name, value, `a free cell [x, y] from [1, 1] to [${last}, ${last}], the goal aside`);
  return at(task, ...value);
}

function number(name, value, low, high, whole) {
  if (typeof value !== "number" || !(value >= low && value <= high) || (whole && !Number.isInteger(value)))
    refuse(name, value, `a ${whole ? "whole " : ""}number from ${String(low).replace("-", "−")} to ${high}`);
  return value;
}

function oneOf(name, value, allowed) {
  if (!allowed.includes(value)) refuse(name, value, `one of ${allowed.join(", ")}`);
  return value;
}

// The game's part of a scene: { agent, direction, obstacles, t }, and the RTG.
function checkPlay(raw, task) {
  if (!isObject(raw)) refuse("description", raw, "an object with agent, direction and obstacles");
  const { t = 0, rtg = 0.9 } = raw;
  if (!Array.isArray(raw.obstacles) || raw.obstacles.length > most(task)) refuse("obstacles", raw.obstacles, `a list of at most ${most(task)} cells`);
  const agent = cell(task, "agent", raw.agent), obstacles = raw.obstacles.map((value) => cell(task, "obstacle", value));
  if (new Set([agent, ...obstacles]).size !== obstacles.length + 1) refuse("obstacles", raw.obstacles, "on cells that differ from each other and from the agent's");
  const direction = COMPASS.indexOf(oneOf("direction", raw.direction, COMPASS));
  number("timestep t", t, 0, task.max_steps - 1, true);
  return { state: { agent, direction, obstacles, t }, rtg: number("rtg", rtg, -1, 1) };
}

function checkParts(raw, cfg, hasSource) {
  if (!isObject(raw)) refuse("parts", raw, "an object from components to what they are replaced by");
  const ways = editable(cfg);
  for (const [name, how] of Object.entries(raw)) {
    const allowed = Object.hasOwn(ways, name) ? ways[name] : (isNeuron(cfg, name) ? ["zero", "mean", "patch"] : null);
    if (!allowed) refuse("parts", name, "components of this model, such as L0H1, L0 MLP or L0N17");
    oneOf(`edit of ${name}`, how, allowed);
    if (how === "patch" && !hasSource) refuse("source", null, "a remembered scene, since something is patched from it");
  }
  return { ...raw };
}

function checkSteer(raw) {
  if (raw === null) return null;
  if (!isObject(raw)) refuse("steer", raw, "an object with direction, at and amount");
  oneOf("direction of steering", raw.direction, Object.keys(DIRECTIONS));
  oneOf("place of steering", raw.at, SITES);
  return { direction: raw.direction, at: raw.at, amount: number("amount of steering", raw.amount, -4, 4) };
}

// A scene's data, checked against the task and the models on offer ({ name → cfg }), with what it leaves out filled in.
export function checkScene(raw, task, models, fallback) {
  const play = checkPlay(raw, task);
  const { model = fallback, random = 0, acting = "greedy", preference = "F-R", parts = {}, steer = null, source = null } = raw;
  oneOf("model", model, Object.keys(models));
  return {
    ...play, model,
    source: source === null ? null : checkPlay(source, task),
    random: number("random", random, 0, 2 ** 32 - 1, true),
    acting: oneOf("acting", acting, ACTING),
    preference: oneOf("preference", preference, Object.keys(PREFERENCES)),
    parts: checkParts(parts, models[model], source !== null),
    steer: checkSteer(steer),
  };
}

const plainPlay = (task, { state, rtg }) => ({
  agent: xy(task, state.agent), direction: COMPASS[state.direction], obstacles: state.obstacles.map((c) => xy(task, c)), t: state.t, rtg,
});

export function describeScene(task, scene) {
  const { model, random, acting, preference, parts, steer, source } = scene;
  const plain = { model, ...plainPlay(task, scene), random, acting, preference };
  if (Object.keys(parts).length) plain.parts = parts;
  if (steer) plain.steer = steer;
  if (source) plain.source = plainPlay(task, source);
  return plain;
}

// FNV-1a, eight hexadecimal digits: it finds a changed letter, it keeps no secret.
function checksum(text) {
  let hash = 0x811c9dc5;
  for (let k = 0; k < text.length; k++) hash = Math.imul(hash ^ text.charCodeAt(k), 0x01000193) >>> 0;
  return hash.toString(16).padStart(8, "0");
}

// A scene as letters that a URL may hold, and back.
export function encodeScene(plain) {
  const bytes = new TextEncoder().encode(JSON.stringify(plain));
  const text = btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return `${text}.${checksum(text)}`;
}

export function decodeScene(code) {
  const [text, sum, ...rest] = String(code).split(".");
  try {
    if (rest.length || sum !== checksum(text)) throw new Error("changed");
    const bytes = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (letter) => letter.charCodeAt(0));
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch {
    throw new PlaygroundError("This link's scene cannot be read: part of the link is missing or was changed. The first scene is shown instead.");
  }
}
