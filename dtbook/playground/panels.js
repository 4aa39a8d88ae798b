// What one watches: each panel is { element, update(frame) }. A frame holds the scene's run before any intervention, and
// after it (null without one): { scene, task, model, input, edits, before, after, weights, … }; what else a panel shows it
// computes itself.

import { ACTIONS, CHANNELS, INTACT, allParts, dot, neuronContributions, scan, seenUnder, stateInput, weightMap } from "./engine.js";
import { COMPASS, xy } from "./game.js";
import { h, mapPicture, percent, scanPicture, setAttribute, setText, signed, thingsInView, viewPicture } from "./draw.js";

export const panel = (name, title, ...content) => h("section", { class: `dtp-panel dtp-${name}`, "aria-label": title }, h("h3", {}, title), ...content);

function table(label, columns) {
  const body = h("tbody"), head = h("tr", {}, columns.map((text) => h("th", { scope: "col", class: text ? null : "dtp-blank" }, text)));
  return { element: h("table", { "aria-label": label }, h("thead", {}, head), body), body };
}

// A row of cells made once; `set(values)` afterwards only changes texts and widths, so a screen reader keeps its place.
function row(title, hint) {
  const bar = h("span", { class: "dtp-bar", "aria-hidden": "true" });
  const numbers = [h("span"), h("span")], cells = numbers.map((number, k) => h("td", { class: `dtp-number ${k ? "dtp-after" : ""}` }, number));
  return { element: h("tr", {}, h("th", { scope: "row", title: hint }, title), h("td", { class: "dtp-barcell" }, bar), cells), bar, numbers };
}

// Bars from the middle for signed values, from the left for shares; limit is the value of a full bar. They are backgrounds,
// which move without a new layout: a background as wide as w % of its box begins at left % where its position is left / (1 − w).
function setRow({ bar, numbers }, before, after, limit, show, isSigned) {
  const style = [before, after].map((value, k) => {
    const share = value == null || !limit ? 0 : Math.min(Math.abs(value) / limit, 1) * (isSigned ? 50 : 100);
    const left = !isSigned ? 0 : value < 0 ? 50 - share : 50;
    setText(numbers[k], value == null ? "" : show(value));
    return `--wide-${k}:${share.toFixed(2)}%;--from-${k}:${share < 100 ? (left / (1 - share / 100)).toFixed(2) : 0}%`;
  });
  setAttribute(bar, "style", style.join(";"));
  bar.classList.toggle("both", after != null);
  bar.classList.toggle("signed", Boolean(isSigned));
}

export function viewPanel() {
  const picture = viewPicture();
  return {
    element: panel("seen", "What it sees", h("div", { class: "dtp-view" }, picture.element)),
    update({ input }) {
      const { front: ahead, obstacles, goal } = thingsInView(input.view);
      picture.set(input.view, `The agent's view: in front ${ahead}; ${obstacles} obstacles in view; the goal is ${goal ? "" : "not "}in view.`);
    },
  };
}

export function probabilityPanel() {
  const { element, body } = table("Probability and logit of each action", ["", "", "P", ""]);
  const rows = ACTIONS.map((name, k) => row(h("span", {}, h("span", { class: `dtp-key action-${k}`, "aria-hidden": "true" }), name), `minigrid's action ${k}`));
  const logits = ACTIONS.map((name) => row(`${name} logit`, `logit of ${name}`));
  body.append(...rows.map((r) => r.element), ...logits.map((r) => r.element));
  return {
    element: panel("probabilities", "What it would do", element),
    update({ before, after }) {
      const largest = Math.max(...[before, after].flatMap((r) => r?.logits ?? []).map(Math.abs));
      rows.forEach((r, k) => setRow(r, before.probs[k], after?.probs[k], 1, percent));
      logits.forEach((r, k) => setRow(r, before.logits[k], after?.logits[k], largest, signed, true));
    },
  };
}

export function attentionPanel(cfg) {
  const { element, body } = table("Share of each head's attention on the RTG token; the rest is on the state token", ["", "", "to RTG", ""]);
  const heads = Array.from({ length: cfg.n_layers }, (_, l) => Array.from({ length: cfg.n_heads }, (_, head) => ({ l, head, row: row(`L${l}H${head}`, `layer ${l}, head ${head}`) }))).flat();
  body.append(...heads.map(({ row }) => row.element));
  return {
    element: panel("attention", "Where its heads look", element),
    update({ before, after }) {
      for (const { l, head, row } of heads)
        setRow(row, before.layers[l].pattern[head][0], after?.layers[l].pattern[head][0], 1, percent);
    },
  };
}

const HINTS = {
  time: "time embedding of the state token", position: "positional embedding of the state token", b_U: "bias of the logits",
  steering: "what is added by steering",
};
const hint = (name) => HINTS[name] ?? (name.startsWith("state") ? `state embedding, ${name.slice(7)} channel` : name.includes("H") ? "written by this head" : name);

export function contributionPanel(cfg, control) {
  const { element, body } = table("Contribution of each component to the preference", ["", "", "logits", ""]);
  const rows = new Map([...allParts(cfg), "steering"].map((name) => [name, row(name, hint(name))]));
  const sum = row("sum", "the logit difference");
  sum.element.classList.add("dtp-sum");
  body.append(...[...rows.values()].map((r) => r.element), sum.element);
  rows.get("steering").element.classList.add("dtp-optional");
  return {
    element: panel("contributions", "Why: exact contributions", control, element),
    update({ before, after, weights }) {
      const value = (result, name) => (result?.parts[name] ? dot(result.parts[name], weights) : result ? 0 : null);
      const all = [...rows.keys()].flatMap((name) => [value(before, name), value(after, name) ?? 0]);
      const total = (result) => (result ? dot(result.logits, weights) : null);
      const limit = Math.max(...all.map(Math.abs), Math.abs(total(before)), Math.abs(total(after) ?? 0));
      for (const [name, r] of rows) setRow(r, value(before, name), value(after, name), limit, signed, true);
      rows.get("steering").element.classList.toggle("dtp-off", !after?.parts.steering);
      setRow(sum, total(before), total(after), limit, signed, true);
    },
  };
}

const RTGS = Array.from({ length: 21 }, (_, k) => Number((-1 + k / 10).toFixed(1)));

export function scanPanel() {
  const picture = scanPicture();
  const key = h("p", { class: "dtp-legend" }, ACTIONS.map((name, k) => h("span", {}, h("span", { class: `dtp-key action-${k}` }), name)), h("span", { class: "dtp-dashed" }, "dashed: after"));
  return {
    element: panel("rtgscan", "If it were asked for another return", h("div", { class: "dtp-scan" }, picture.element), key),
    update({ scene, model, input, edits, after }) {
      const scans = { before: scan(model, input, INTACT, RTGS), after: after && scan(model, input, edits, RTGS) };
      const at = (probs, rtg) => percent(probs[RTGS.indexOf(rtg)][2]);
      const words = (probs) => `P(forward) is ${at(probs, -1)} at RTG −1, ${at(probs, 0)} at 0, ${at(probs, 0.9)} at 0.9`;
      const label = `Probabilities of the actions over RTG. ${words(scans.before)}${scans.after ? `; after the intervention, ${words(scans.after)}` : ""}.`;
      picture.set(RTGS, scans.before, scans.after, scene.rtg, label);
      key.lastChild.hidden = !scans.after;
    },
  };
}

export function neuronPanel(shown, toggle, choose) {
  const { element, body } = table("The neurons that contribute most to the preference", ["", "", "logits", "", ""]);
  const rows = Array.from({ length: shown }, () => {
    const r = row("", "a neuron of the MLP"), box = h("input", { type: "checkbox" });
    box.addEventListener("change", () => toggle(r.name, box.checked));
    const name = h("button", { type: "button", class: "dtp-link", onclick: () => choose(r.name) });
    r.element.firstChild.replaceChildren(name);
    r.element.append(h("td", { class: "dtp-check" }, box));
    body.append(r.element);
    return Object.assign(r, { box, label: name });
  });
  return {
    element: panel("neurons", "Its busiest neurons", element),
    update({ model, before, after, weights, scene }) {
      const ranked = neuronContributions(model, before, weights).slice(0, shown), limit = Math.abs(ranked[0].effect);
      const now = after && new Map(neuronContributions(model, after, weights).map((n) => [n.name, n.effect]));
      rows.forEach((r, k) => {
        const { name, effect, value } = ranked[k];
        r.name = name;
        setText(r.label, name);
        setAttribute(r.label, "title", `activation ${signed(value)}; show what it reads`);
        r.box.checked = name in scene.parts;
        setAttribute(r.box, "aria-label", `ablate ${name} to zero`);
        setRow(r, effect, now?.get(name), limit, signed, true);
      });
    },
  };
}

// What a cell of the view has to do with it, of each channel: the weights, or what they make of this scene before and after.
export function mapPanel(cfg, choice) {
  const pairs = CHANNELS.map(() => ["", "dtp-after"].map((when) => {
    const picture = mapPicture(), caption = h("figcaption");
    return { picture, caption, element: h("figure", { class: when }, h("div", { class: "dtp-map" }, picture.element), caption) };
  }));
  const least = h("span"), most = h("span"), unit = h("span"), row = h("div", { class: "dtp-maprow" }, pairs.flat().map((one) => one.element));
  const scale = h("p", { class: "dtp-legend dtp-scale" }, least, h("span", { class: "dtp-gradient", "aria-hidden": "true" }), most, unit);
  return {
    element: panel("maps", "What is read from each cell", choice.element, scale, row),
    update({ model, input, scene, edits, before, after }) {
      const { what, now } = choice.value(), weight = weightMap(model, what, scene.preference), both = Boolean(now && after);
      const results = both ? [[before, INTACT], [after, edits]] : [[before, INTACT]];
      const shown = results.map(([result, edits]) => mapsOf(cfg, weight, now, through(what, result, edits, input)));
      const limit = Math.max(...shown.flat().flatMap((map) => Array.from(map, Math.abs)));
      row.classList.toggle("both", both);
      shown.forEach((maps, k) => maps.forEach((map, channel) => {
        const { picture, caption } = pairs[channel][k], name = CHANNELS[channel], when = k ? ", after" : both ? ", before" : "";
        const sum = now ? `, sum ${signed(map.reduce((a, b) => a + b, 0))}` : "";
        picture.set(map, limit, `${name} channel${when}: front cell ${signed(map[26], 3)}${sum}.`);
        setText(caption, `${k ? "after" : name}: front ${signed(map[26])}${sum}`);
      }));
      setText(least, `−${limit.toPrecision(2)}`);
      setText(most, limit.toPrecision(2));
      setText(unit, choice.unit());
    },
  };
}

function mapsOf(cfg, weight, now, { view, factor }) {
  const maps = CHANNELS.map(() => new Float64Array(49));
  if (now || cfg.encoding === "one-hot")
    for (const { row, value, channel, cell } of stateInput(cfg, view)) maps[channel][cell] = now ? factor * value * weight[row] : weight[row];
  else maps.forEach((map, channel) => map.set(weight.subarray(49 * channel, 49 * channel + 49)));
  return maps;
}

// In a scene, what a cell adds is its weight times what is there, times how far the head lets it through: not at all where
// the head is ablated; where it is patched, it reads the remembered scene.
function through(what, result, edits, input) {
  const seen = seenUnder(edits, input), [name, l, head] = /^L(\d+)H(\d+)/.exec(what) ?? [], how = edits.parts[name];
  if (head == null) return { view: seen.view, factor: 1 };
  if (what.endsWith("QK")) return { view: seen.view, factor: seen.rtg };
  const { input: read } = how === "patch" || edits.parts[`${name} V`] === "patch" ? edits.source : { input: seen };
  const share = (how === "patch" ? edits.source : result).layers[l].pattern[head][1];
  return { view: read.view, factor: how === "zero" || how === "mean" ? 0 : share };
}

// The scene in words, for the board's label and the status line.
export function describePlace(task, state, view) {
  const [x, y] = xy(task, state.agent), things = thingsInView(view);
  const obstacles = state.obstacles.map((cell) => xy(task, cell).join(" ")).join(", ");
  return `Agent at column ${x}, row ${y}, facing ${COMPASS[state.direction]}, ${things.front} in front. Obstacles at ${obstacles || "no cell"}; goal at ${task.size - 2} ${task.size - 2}.`;
}

export const describeChoice = (probs) => `The model: ${ACTIONS.map((name, k) => `${name} ${percent(probs[k])}`).join(", ")}.`;
