// The Decision Transformer and its interventions in plain numbers: no page, no game. A run is exact up to rounding, and
// everything has the name it has in dtbook: parts of the logits as in `attribution.decompose`, edits as in
// `interventions`. Vectors are rows; tensors lie row by row in a Float64Array each.
//
// A model here has a context of one timestep: two tokens, RTG (R) and state (S); the action is read at S.

export class PlaygroundError extends Error {} // its message is one sentence for the reader

export const ACTIONS = ["left", "right", "forward"];
const LETTERS = "LRF";
const ONE_HOT = [11, 6, 3]; // what minigrid's object, colour and state channel can hold
export const CHANNELS = ["object", "colour", "state"];
export const CELL_CODES = { empty: [1, 0, 0], wall: [2, 5, 0], obstacle: [6, 2, 0], goal: [8, 1, 0] };
export const INTACT = Object.freeze({ parts: Object.freeze({}), source: null, steer: null });
export const SITES = ["resid_pre", "resid_mid", "resid_post"];

// Reading weights

function expectedShapes(cfg) {
  const { d_model: d, n_heads: h, d_head: k, d_mlp: m } = cfg;
  const rows = (cfg.encoding === "index" ? 3 : 20) * cfg.view_size ** 2;
  const shapes = { W_E_rtg: [d], W_E_state: [rows, d], W_E_time: [cfg.max_steps + 1, d] };
  Object.assign(shapes, { W_pos: [3 * cfg.n_timesteps, d], W_U: [d, cfg.n_actions], b_U: [cfg.n_actions] });
  for (let l = 0; l < cfg.n_layers; l++) {
    for (const part of "QKV") {
      shapes[`blocks.${l}.attn.W_${part}`] = [h, d, k];
      shapes[`blocks.${l}.attn.b_${part}`] = [h, k];
    }
    Object.assign(shapes, {
      [`blocks.${l}.attn.W_O`]: [h, k, d], [`blocks.${l}.attn.b_O`]: [d],
      [`blocks.${l}.mlp.W_in`]: [d, m], [`blocks.${l}.mlp.b_in`]: [m],
      [`blocks.${l}.mlp.W_out`]: [m, d], [`blocks.${l}.mlp.b_out`]: [d],
      [`mean.${l}.z`]: [h, k], [`mean.${l}.post`]: [m], [`mean.${l}.mlp_out`]: [d],
    });
  }
  return shapes;
}

function decode(base64, name) {
  let bytes;
  try {
    bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  } catch {
    throw new PlaygroundError(`The weights of ${name} are damaged: they are not base64.`);
  }
  if (bytes.length % 4) throw new PlaygroundError(`The weights of ${name} are damaged: ${bytes.length} bytes are not whole float32 numbers.`);
  return new Float32Array(bytes.buffer);
}

// The model of `entry` { name, cfg, tensors: [[name, shape], …] } with its weights, float32 in base64.
export function loadModel(entry, base64) {
  const { name, cfg } = entry;
  if (cfg?.n_timesteps !== 1 || !(cfg.n_layers >= 1) || cfg.n_actions !== 3 || cfg.view_size !== 7)
    throw new PlaygroundError(`The playground plays models of one timestep, at least one layer, three actions and a view of 7×7 cells; ${name} is none.`);
  const numbers = decode(base64, name), shapes = expectedShapes(cfg), W = {};
  let start = 0;
  for (const [tensor, shape] of entry.tensors) {
    const length = shape.reduce((a, b) => a * b, 1);
    W[tensor] = Float64Array.from(numbers.subarray(start, start + length)); // one kind of array throughout is twice as fast
    if (shapes[tensor] && String(shapes[tensor]) !== String(shape))
      throw new PlaygroundError(`The weights of ${name} do not fit: ${tensor} has shape (${shape}), its configuration asks for (${shapes[tensor]}).`);
    start += length;
  }
  if (start !== numbers.length)
    throw new PlaygroundError(`The weights of ${name} do not fit: there are ${numbers.length} numbers, its tensors have ${start}.`);
  const missing = Object.keys(shapes).find((tensor) => !W[tensor]);
  if (missing) throw new PlaygroundError(`The weights of ${name} do not fit: ${missing} is missing.`);
  const bad = Object.keys(W).find((tensor) => !W[tensor].every(Number.isFinite));
  if (bad) throw new PlaygroundError(`The weights of ${name} cannot be used: ${bad} holds a value that is not a finite number.`);
  const model = { name, cfg, W, memo: new Map(), sides: [] };
  model.stateToLogits = times(W.W_E_state, W.W_U, W.W_E_state.length / cfg.d_model, cfg.d_model, 3);
  model.perRtg = project(model, 0, W.W_E_rtg, "KV", false);
  model.neuronToLogits = Array.from({ length: cfg.n_layers }, (_, l) => times(W[`blocks.${l}.mlp.W_out`], W.W_U, cfg.d_mlp, cfg.d_model, 3));
  return model;
}

// Small linear algebra

// y += x @ W[from …], W with a row of m numbers for each of x; four rows at a time, those whose x is 0 left out
function addProduct(y, x, W, from, m) {
  const lit = [];
  for (let i = 0; i < x.length; i++) if (x[i] !== 0) lit.push(i);
  let k = 0;
  for (; k + 4 <= lit.length; k += 4) {
    const [a, b, c, d] = [x[lit[k]], x[lit[k + 1]], x[lit[k + 2]], x[lit[k + 3]]];
    const A = from + lit[k] * m, B = from + lit[k + 1] * m, C = from + lit[k + 2] * m, D = from + lit[k + 3] * m;
    for (let j = 0; j < m; j++) y[j] += a * W[A + j] + b * W[B + j] + c * W[C + j] + d * W[D + j];
  }
  for (; k < lit.length; k++) {
    const a = x[lit[k]], A = from + lit[k] * m;
    for (let j = 0; j < m; j++) y[j] += a * W[A + j];
  }
  return y;
}

function times(A, B, n, k, m) {
  const C = new Float64Array(n * m);
  for (let i = 0; i < n; i++) addProduct(C.subarray(i * m, (i + 1) * m), A.subarray(i * k, (i + 1) * k), B, 0, m);
  return C;
}

const affine = (x, W, b, m) => addProduct(Float64Array.from(b), x, W, 0, m);

export function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

function add(x, y, factor = 1) {
  for (let i = 0; i < x.length; i++) x[i] += factor * y[i];
  return x;
}

export function softmax(values) {
  const largest = Math.max(...values), e = Array.from(values, (value) => Math.exp(value - largest));
  const total = e.reduce((a, b) => a + b, 0);
  return e.map((value) => value / total);
}

// What enters

// The rows of W_E_state that a view lights, with the number that multiplies each and the minigrid channel it is of.
export function stateInput(cfg, view) {
  const cells = cfg.view_size ** 2, input = [];
  for (let channel = 0, first = 0; channel < 3; first += cfg.encoding === "index" ? 1 : ONE_HOT[channel], channel++)
    for (let cell = 0; cell < cells; cell++) {
      const value = view[3 * cell + channel];
      if (cfg.encoding === "one-hot") input.push({ row: (first + value) * cells + cell, value: 1, channel, cell });
      else if (value) input.push({ row: first * cells + cell, value, channel, cell });
    }
  return input;
}

function embedState(model, view) {
  const { cfg, W } = model, vector = new Float64Array(cfg.d_model);
  for (const { row, value } of stateInput(cfg, view))
    add(vector, W.W_E_state.subarray(row * cfg.d_model, (row + 1) * cfg.d_model), value);
  return vector;
}

const vectorAt = (W, index, d) => W.subarray(index * d, (index + 1) * d);

// What an RTG scan need not compute anew: the state token before the first head with what is read from it, the parts of
// the logits that are the embeddings', and the RTG token's keys and values, which are affine in RTG.
function sideOf(model, view, t, steer) {
  const kept = model.sides.find((side) => side.view === view && side.t === t && side.steer === steer);
  if (kept) return kept;
  const { cfg, W } = model, time = vectorAt(W.W_E_time, t, cfg.d_model);
  const resid = add(add(embedState(model, view), time), vectorAt(W.W_pos, 1, cfg.d_model));
  if (steer?.at === "resid_pre") add(resid, steer.vector, steer.amount);
  const rtg = add(Float64Array.from(time), vectorAt(W.W_pos, 0, cfg.d_model));
  const parts = embeddingParts(model, view, t);
  const side = { view, t, steer, resid, parts, heads: project(model, 0, resid, "QKV"), rtg, rtgHeads: project(model, 0, rtg, "KV") };
  model.sides = [side, ...model.sides.slice(0, 3)];
  return side;
}

// Keys and values of the RTG token in the first layer: those at RTG 0, and a multiple of what one unit of RTG adds.
function rtgHeads(model, side, rtg) {
  return side.rtgHeads.map(({ K, V }, head) => {
    const unit = model.perRtg[head];
    return { K: add(Float64Array.from(K), unit.K, rtg), V: add(Float64Array.from(V), unit.V, rtg) };
  });
}

function project(model, layer, resid, letters, biased = true) {
  const { cfg, W } = model, at = `blocks.${layer}.attn.`, size = cfg.d_model * cfg.d_head;
  const one = (head, X) => {
    const start = biased ? Float64Array.from(vectorAt(W[`${at}b_${X}`], head, cfg.d_head)) : new Float64Array(cfg.d_head);
    return addProduct(start, resid, W[`${at}W_${X}`], head * size, cfg.d_head);
  };
  return Array.from({ length: cfg.n_heads }, (_, head) => Object.fromEntries([...letters].map((X) => [X, one(head, X)])));
}

// A run

// { logits, probs, parts: name → three logits, layers: [{ pattern, V, z, post, mlp }], input }, of one input
// { view: image[i, j, c] at 21·i + 3·j + c, rtg, t } under edits
// { parts: name → "zero" | "mean" | "patch", source: the run patched from, steer: { vector, amount, at } }.
export function run(model, input, edits = INTACT) {
  const { cfg, W } = model, d = cfg.d_model, seen = seenUnder(edits, input);
  const side = sideOf(model, seen.view, seen.t, edits.steer), last = cfg.n_layers - 1;
  const state = Float64Array.from(side.resid), parts = { ...side.parts }, layers = [];
  let rtg = last ? add(Float64Array.from(side.rtg), W.W_E_rtg, seen.rtg) : null; // with one layer, keys and values do
  for (let l = 0; l <= last; l++) {
    const fromRtg = l ? project(model, l, rtg, "KV") : rtgHeads(model, side, seen.rtg);
    const layer = attend(model, l, l ? project(model, l, state, "QKV") : side.heads, fromRtg, edits);
    layer.z.forEach((z, head) => {
      const written = addProduct(new Float64Array(d), z, W[`blocks.${l}.attn.W_O`], head * cfg.d_head * d, d);
      parts[`L${l}H${head}`] = toLogits(model, written);
      add(state, written);
    });
    parts[`L${l} b_O`] = toLogits(model, W[`blocks.${l}.attn.b_O`]);
    add(state, W[`blocks.${l}.attn.b_O`]);
    if (l === last && edits.steer?.at === "resid_mid") add(state, edits.steer.vector, edits.steer.amount);
    layer.post = neurons(model, l, state, edits);
    layer.mlp = () => mlpOut(model, l, layer.post, edits); // a vector only few ask for
    parts[`L${l} MLP`] = edits.parts[`L${l} MLP`] ? toLogits(model, layer.mlp()) : mlpLogits(model, l, layer.post);
    if (l < last) {
      add(state, layer.mlp());
      rtg = rtgAfter(model, l, rtg, layer.V);
    }
    layers.push(layer);
  }
  if (edits.steer) parts.steering = toLogits(model, edits.steer.vector).map((x) => x * edits.steer.amount);
  parts.b_U = W.b_U;
  const logits = Array.from(Object.values(parts).reduce((sum, part) => add(sum, part), new Float64Array(3)));
  return { logits, probs: softmax(logits), parts, layers, input };
}

// The input with what is patched of it.
export function seenUnder({ parts, source }, input) {
  if (!source && Object.values(parts).includes("patch")) throw new PlaygroundError("There is no remembered scene to patch from.");
  const of = (name) => (parts[name] === "patch" ? source.input : input);
  return { rtg: of("rtg").rtg, view: of("state").view, t: of("time").t };
}

const toLogits = (model, vector) => addProduct(new Float64Array(3), vector, model.W.W_U, 0, 3);

// neuronToLogits is W_out @ W_U
const mlpLogits = (model, l, post) => addProduct(toLogits(model, model.W[`blocks.${l}.mlp.b_out`]), post, model.neuronToLogits[l], 0, 3);

function embeddingParts(model, view, t) {
  const { cfg, W, stateToLogits } = model, parts = {};
  for (const name of CHANNELS) parts[`state: ${name}`] = new Float64Array(3);
  for (const { row, value, channel } of stateInput(cfg, view))
    add(parts[`state: ${CHANNELS[channel]}`], stateToLogits.subarray(3 * row, 3 * row + 3), value);
  parts.time = toLogits(model, vectorAt(W.W_E_time, t, cfg.d_model));
  parts.position = toLogits(model, vectorAt(W.W_pos, 1, cfg.d_model));
  return parts;
}

// What the heads of a layer take from the two tokens: pattern [to RTG, to state], V [of RTG, of state], and z.
function attend(model, l, state, rtg, edits) {
  const pattern = [], V = [], z = [], from = edits.source?.layers[l];
  state.forEach(({ Q, K, V: own }, head) => {
    const name = `L${l}H${head}`, scale = 1 / Math.sqrt(model.cfg.d_head);
    const values = edits.parts[`${name} V`] === "patch" ? from.V[head] : [rtg[head].V, own];
    const weights = edits.parts[`${name} pattern`] === "patch" ? from.pattern[head] : softmax([dot(Q, rtg[head].K) * scale, dot(Q, K) * scale]);
    const mixed = add(values[0].map((x) => x * weights[0]), values[1], weights[1]);
    pattern.push(weights);
    V.push(values);
    z.push(headOutput(model, l, head, mixed, edits));
  });
  return { pattern, V, z };
}

const headOutput = (model, l, head, z, edits) =>
  replaced(edits, `L${l}H${head}`, z, () => vectorAt(model.W[`mean.${l}.z`], head, model.cfg.d_head), () => edits.source.layers[l].z[head]);

function replaced(edits, name, value, mean, patch) {
  const how = edits.parts[name];
  if (!how) return value;
  if (how === "zero") return new Float64Array(value.length);
  return Float64Array.from(how === "mean" ? mean() : patch());
}

function neurons(model, l, resid, edits) {
  const { W, cfg } = model, at = `blocks.${l}.mlp.`;
  return activations(model, l, affine(resid, W[at + "W_in"], W[at + "b_in"], cfg.d_mlp), edits);
}

function activations(model, l, pre, edits) {
  const { W } = model, post = pre.map((x) => Math.max(x, 0));
  for (const [name, how] of Object.entries(edits.parts)) {
    const n = name.startsWith(`L${l}N`) ? Number(name.slice(`L${l}N`.length)) : -1;
    if (n >= 0) post[n] = how === "zero" ? 0 : how === "mean" ? W[`mean.${l}.post`][n] : edits.source.layers[l].post[n];
  }
  return post;
}

function mlpOut(model, l, post, edits) {
  const { W, cfg } = model, at = `blocks.${l}.mlp.`;
  const out = affine(post, W[at + "W_out"], W[at + "b_out"], cfg.d_model);
  return replaced(edits, `L${l} MLP`, out, () => W[`mean.${l}.mlp_out`], () => edits.source.layers[l].mlp());
}

// The RTG token sees only itself, and edits of components are made at the state token.
function rtgAfter(model, l, rtg, V) {
  const { W, cfg } = model, after = add(Float64Array.from(rtg), W[`blocks.${l}.attn.b_O`]);
  V.forEach(([own], head) => addProduct(after, own, W[`blocks.${l}.attn.W_O`], head * cfg.d_head * cfg.d_model, cfg.d_model));
  return add(after, mlpOut(model, l, neurons(model, l, after, INTACT), INTACT));
}

// What a reader asks of a run

// "F-R" → the weights it gives the logits, as `attribution.contrast`.
export function contrast(preference) {
  const weights = [0, 0, 0];
  preference.split("-").forEach((letter, k) => { weights[LETTERS.indexOf(letter)] = k ? -1 : 1; });
  return weights;
}

export const allParts = (cfg) => {
  const layers = Array.from({ length: cfg.n_layers }, (_, l) => [...Array.from({ length: cfg.n_heads }, (_, h) => `L${l}H${h}`), `L${l} b_O`, `L${l} MLP`]);
  return [...CHANNELS.map((name) => `state: ${name}`), "time", "position", ...layers.flat(), "b_U"];
};

// Which edits a model knows: name → the ways in which it can be edited.
export function editable(cfg) {
  const ways = { rtg: ["patch"], state: ["patch"], time: ["patch"] };
  for (let l = 0; l < cfg.n_layers; l++) {
    for (let h = 0; h < cfg.n_heads; h++)
      Object.assign(ways, { [`L${l}H${h}`]: ["zero", "mean", "patch"], [`L${l}H${h} pattern`]: ["patch"], [`L${l}H${h} V`]: ["patch"] });
    ways[`L${l} MLP`] = ["zero", "mean", "patch"];
  }
  return ways;
}

export const isNeuron = (cfg, name) => {
  const match = /^L(\d+)N(\d+)$/.exec(name);
  return Boolean(match) && +match[1] < cfg.n_layers && +match[2] < cfg.d_mlp;
};

// Every neuron's direct contribution to a preference, largest first.
export function neuronContributions(model, result, weights) {
  const found = result.layers.flatMap(({ post }, l) =>
    Array.from(post, (value, n) => ({ name: `L${l}N${n}`, value, effect: value * dot(model.neuronToLogits[l].subarray(3 * n, 3 * n + 3), weights) })));
  return found.sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect));
}

// The probabilities at each of some RTGs.
export function scan(model, input, edits, rtgs) {
  if (model.cfg.n_layers > 1 || edits.parts.rtg) return rtgs.map((rtg) => run(model, { ...input, rtg }, edits).probs);
  const seen = seenUnder(edits, input), side = sideOf(model, seen.view, seen.t, edits.steer);
  const { base, heads } = readOnce(model, side, edits);
  const mlp = edits.parts["L0 MLP"] ? toLogits(model, mlpOut(model, 0, new Float64Array(model.cfg.d_mlp), edits)) : null;
  return rtgs.map((rtg) => {
    const pre = Float64Array.from(base.pre), logits = Float64Array.from(base.logits);
    for (const { images, scores, pattern } of heads) {
      const [a, b] = pattern ?? softmax([scores.rtg + rtg * scores.perRtg, scores.state]);
      [a, a * rtg, b].forEach((share, k) => { add(pre, images[k].pre, share); add(logits, images[k].logits, share); });
    }
    return softmax(add(logits, mlp ?? mlpLogits(model, 0, activations(model, 0, pre, edits))));
  });
}

// In one layer, RTG does nothing but mix each head's three vectors of values (the RTG token's at RTG 0, what a unit of RTG
// adds, and the state token's) in other shares. So what a neuron and a logit read of each is worked out once for all RTGs.
function readOnce(model, side, edits) {
  const { cfg, W } = model, { source, steer } = edits, scale = 1 / Math.sqrt(cfg.d_head), heads = [];
  const resid = add(Float64Array.from(side.resid), W["blocks.0.attn.b_O"]);
  if (steer?.at === "resid_mid") add(resid, steer.vector, steer.amount);
  const base = image(model, resid);
  add(base.pre, W["blocks.0.mlp.b_in"]);
  add(base.logits, W.b_U);
  if (steer?.at === "resid_post") add(base.logits, toLogits(model, steer.vector), steer.amount);
  side.heads.forEach(({ Q, K, V }, head) => {
    const name = `L0H${head}`, { K: rtgK, V: rtgV } = side.rtgHeads[head], unit = model.perRtg[head], from = source?.layers[0];
    if (edits.parts[name]) {
      const written = imageOfHead(model, head, headOutput(model, 0, head, V, edits));
      add(base.pre, written.pre);
      add(base.logits, written.logits);
      return;
    }
    const patched = edits.parts[`${name} V`] === "patch", values = patched ? [from.V[head][0], new Float64Array(cfg.d_head), from.V[head][1]] : [rtgV, unit.V, V];
    heads.push({
      images: values.map((value) => imageOfHead(model, head, value)),
      pattern: edits.parts[`${name} pattern`] === "patch" ? from.pattern[head] : null,
      scores: { rtg: dot(Q, rtgK) * scale, perRtg: dot(Q, unit.K) * scale, state: dot(Q, K) * scale },
    });
  });
  return { base, heads };
}

// What the neurons (before ReLU and bias) and the logits read of a vector in the only layer's residual stream; of a head's z.
function image(model, vector) {
  return { pre: addProduct(new Float64Array(model.cfg.d_mlp), vector, model.W["blocks.0.mlp.W_in"], 0, model.cfg.d_mlp), logits: toLogits(model, vector) };
}

function imageOfHead(model, head, z) {
  const { d_model: d, d_head: k } = model.cfg;
  return image(model, addProduct(new Float64Array(d), z, model.W["blocks.0.attn.W_O"], head * k * d, d));
}

// Directions in the residual stream that one can steer along.
export const DIRECTIONS = {
  "F-R": "forward − right", "F-L": "forward − left", "R-L": "right − left", rtg: "RTG embedding",
  obstacle: "front cell: empty → obstacle", wall: "front cell: empty → wall", goal: "front cell: empty → goal",
};

export function direction(model, name) {
  const { cfg, W } = model;
  if (name === "rtg") return Float64Array.from(W.W_E_rtg);
  if (!(name in CELL_CODES)) return W.W_U.length ? times(W.W_U, Float64Array.from(contrast(name)), cfg.d_model, 3, 1) : null;
  const view = (code) => { const cells = new Uint8Array(147); cells.set(code, 3 * 26); return cells; }; // image[3, 5]
  return add(embedState(model, view(CELL_CODES[name])), embedState(model, view(CELL_CODES.empty)), -1);
}

// Each row of W_E_state dotted with what reads it: "embedding" (a preference), "L0H1 QK" (the score of attention from
// this state to one unit of RTG, divided by √d_head), "L0H1 OV" (onto a preference), "L0N17" (the neuron's input).
export function weightMap(model, what, preference) {
  const key = `${what} ${/QK|N/.test(what) ? "" : preference}`;
  if (!model.memo.has(key)) {
    const { cfg, W } = model, rows = W.W_E_state.length / cfg.d_model;
    model.memo.set(key, times(W.W_E_state, reader(model, what, preference), rows, cfg.d_model, 1));
  }
  return model.memo.get(key);
}

function reader(model, what, preference) {
  const { cfg, W } = model, d = cfg.d_model, k = cfg.d_head, [, l, kind, index] = /^L(\d+)([HN])(\d+)/.exec(what) ?? [];
  if (!kind) return times(W.W_U, Float64Array.from(contrast(preference)), d, 3, 1);
  if (kind === "N") return Float64Array.from({ length: d }, (_, i) => W[`blocks.${l}.mlp.W_in`][i * cfg.d_mlp + +index]);
  const at = (name) => W[`blocks.${l}.attn.${name}`].subarray(index * d * k, (index + 1) * d * k);
  if (what.endsWith("QK")) {
    const key = times(W.W_E_rtg, at("W_K"), 1, d, k);
    return times(at("W_Q"), key, d, k, 1).map((x) => x / Math.sqrt(k));
  }
  const towards = times(W.W_U, Float64Array.from(contrast(preference)), d, 3, 1);
  return times(at("W_V"), times(at("W_O"), towards, k, d, 1), d, k, 1);
}
