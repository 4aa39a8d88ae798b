// What one does: buttons, sliders and selects. Each returns { element, update(frame) } and calls back with what was asked.

import { DIRECTIONS, editable, isNeuron } from "./engine.js";
import { panel } from "./panels.js";
import { h, roomPicture, setAttribute, setText, signed } from "./draw.js";
import { PREFERENCES } from "./scene.js";

export const ACTS = { greedy: "the likeliest action", sampled: "a sampled action" };
// An id of a label, or a name of radio buttons: unique in a page, whose playgrounds may have a copy of this module each.
const fresh = () => `dtp-${(globalThis.dtbookIds = (globalThis.dtbookIds ?? 0) + 1)}`;

export const button = (text, onclick, more = {}) => h("button", { type: "button", onclick, ...more }, text);

export function select(title, options, onchange, more = {}) {
  const id = fresh(), input = h("select", { id, onchange: () => onchange(input.value), ...more });
  fillSelect(input, options);
  return { element: h("div", { class: "dtp-field" }, h("label", { for: id }, title), alone(input)), input };
}

// A box of its own around what changes by itself: an item of a grid is laid out with the grid, what is in it is not.
const alone = (...children) => h("div", { class: "dtp-alone" }, children);

// options: { value: text }
export function fillSelect(input, options) {
  input.replaceChildren(...Object.entries(options).map(([value, text]) => h("option", { value }, text)));
}

export function slider(title, { min, max, step }, show, oninput) {
  const id = fresh(), shown = h("span");
  const input = h("input", { id, type: "range", min, max, step, oninput: () => oninput(Number(input.value)) });
  const element = h("div", { class: "dtp-field dtp-slider" }, h("label", { for: id }, title), alone(input), h("output", { for: id }, shown));
  return {
    element, input,
    set(value) {
      if (Number(input.value) !== value) input.value = value;
      setText(shown, show(value));
      setAttribute(input, "aria-valuetext", show(value));
    },
  };
}

function radios(title, options, onchange) {
  const name = fresh();
  const inputs = Object.entries(options).map(([value, text]) => {
    const input = h("input", { type: "radio", name, value, onchange: () => onchange(value) });
    return { value, input, element: h("label", {}, input, " ", text) };
  });
  return {
    element: h("fieldset", { class: "dtp-radios" }, h("legend", {}, title), inputs.map((r) => r.element)),
    set(value) { for (const r of inputs) r.input.checked = r.value === value; },
  };
}

// The room, played on with arrow keys or edited cell by cell, with the pointer or with a cursor moved by the keys.
export function board(task, on) {
  const picture = roomPicture(task);
  const room = h("div", { class: "dtp-room", tabindex: 0, role: "application", "aria-roledescription": "game board" }, picture.element);
  const keys = {
    ArrowLeft: () => on.act(0), ArrowRight: () => on.act(1), ArrowUp: () => on.act(2),
    m: on.step, r: on.run, u: on.undo, e: on.edit,
  };
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  room.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const editing = on.editing(), move = editing && moves[event.key];
    const answer = move ? () => on.cursor(...move) : editing && [" ", "Enter"].includes(event.key) ? on.place : editing && event.key === "Escape" ? on.edit : keys[event.key];
    if (!answer || (editing && !move && "mru".includes(event.key) && event.key !== "u")) return;
    event.preventDefault();
    answer();
  });
  room.addEventListener("click", (event) => {
    const box = picture.element.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((share) => Math.floor(share * task.size));
    on.click(x, y);
  });
  return {
    element: room,
    update({ scene, cursor, place }) {
      picture.set(scene.state, cursor);
      setAttribute(room, "aria-label", place);
    },
  };
}

export function playControls(task, on) {
  const act = [button("↶ Left", () => on.act(0), { "aria-label": "Turn left" }), button("↑ Forward", () => on.act(2)), button("↷ Right", () => on.act(1), { "aria-label": "Turn right" })];
  const step = button("Model step", on.step), run = button("Run model", on.run, { "aria-pressed": "false" });
  const undo = button("Undo", on.undo), reset = button("New game", on.reset), edit = button("Edit with keys", on.edit, { "aria-pressed": "false" });
  const seed = h("input", { type: "number", min: 0, max: 2 ** 32 - 1, step: 1, value: 0, id: fresh(), inputmode: "numeric" });
  const seedField = h("div", { class: "dtp-field dtp-seed" }, h("label", { for: seed.id }, "Seed"), seed);
  const tool = radios("A click on a free cell", { obstacle: "places an obstacle", agent: "moves the agent" }, on.tool);
  tool.set("obstacle");
  const acting = radios("The model takes", ACTS, on.acting);
  const rtg = slider("RTG asked for", { min: -1, max: 1, step: 0.05 }, (value) => signed(value), on.rtg);
  const t = slider("Timestep", { min: 0, max: task.max_steps - 1, step: 1 }, String, on.t);
  return {
    element: h("div", { class: "dtp-play" },
      h("div", { class: "dtp-buttons dtp-arrows", role: "group", "aria-label": "Play yourself" }, act),
      h("div", { class: "dtp-buttons", role: "group", "aria-label": "Let the model play" }, step, run, undo),
      h("div", { class: "dtp-buttons", role: "group", "aria-label": "Set up the room" }, edit, reset, seedField),
      rtg.element, t.element, acting.element, tool.element),
    seed: () => seed.value,
    update({ scene, running, editing, canUndo }) {
      [...act, step, run].forEach((b) => { b.disabled = Boolean(scene.over); });
      setText(run, running ? "Pause" : "Run model");
      setAttribute(run, "aria-pressed", String(running));
      undo.disabled = !canUndo;
      setText(edit, editing ? "Done editing" : "Edit with keys");
      setAttribute(edit, "aria-pressed", String(editing));
      rtg.set(scene.rtg);
      t.set(scene.state.t);
      acting.set(scene.acting);
    },
  };
}

// The prepared scenes, each one click away, in their groups.
export function presetButtons(presets, onclick) {
  const groups = {};
  for (const preset of presets) (groups[preset.group ?? "Scenes"] ??= []).push(preset);
  return h("div", { class: "dtp-presets", hidden: !presets.length }, Object.entries(groups).map(([title, scenes]) =>
    h("div", { role: "group", "aria-label": title }, h("p", { class: "dtp-note" }, title), scenes.map((scene) => button(scene.name, () => onclick(scene))))));
}

const WAYS = { "": "as it is", zero: "zero", mean: "data-set mean", patch: "from remembered" };
const TITLES = { rtg: "RTG embedding", state: "state embedding", time: "time embedding" };

export function interventionPanel(cfg, task, mean, on) {
  const choices = Object.entries(editable(cfg)).map(([name, ways]) => {
    const options = Object.fromEntries(["", ...ways].map((way) => [way, WAYS[way]]));
    return { name, ...select(TITLES[name] ?? name.replace(" V", " values"), options, (way) => on.part(name, way)) };
  });
  const memory = roomPicture(task), thumb = h("div", { class: "dtp-thumb" }, memory.element), words = h("p", { class: "dtp-note" });
  const remember = button("Remember this scene", on.remember), swap = button("Swap with it", on.swap), clear = button("Undo all interventions", on.clear);
  const directions = { "": "off", ...DIRECTIONS };
  const steer = select("Steer along", directions, (value) => on.steer({ direction: value }));
  const place = select("at the state token", { resid_pre: "before the heads", resid_mid: "before the MLP", resid_post: "at the end" }, (value) => on.steer({ at: value }));
  const amount = slider("times", { min: -4, max: 4, step: 0.1 }, (value) => signed(value, 1), (value) => on.steer({ amount: value }));
  const name = () => neuron.value.trim().toUpperCase(), neurons = h("p", { class: "dtp-note" });
  const becomes = select("becomes", WAYS, (way) => (isNeuron(cfg, name()) ? on.part(name(), way) : on.noNeuron(neuron.value)));
  const neuron = h("input", { type: "text", id: fresh(), value: "L0N0", autocomplete: "off", spellcheck: "false" });
  neuron.addEventListener("change", () => (isNeuron(cfg, name()) ? on.show() : on.noNeuron(neuron.value)));
  return {
    element: panel("interventions", "Intervene",
      h("div", { class: "dtp-parts" }, choices.map((c) => c.element)),
      h("div", { class: "dtp-neuron" }, h("div", { class: "dtp-field" }, h("label", { for: neuron.id }, "Neuron"), neuron), becomes.element, neurons),
      h("p", { class: "dtp-note" }, `The data-set mean is that over ${mean}.`),
      h("div", { class: "dtp-memory" }, thumb, h("div", {}, h("div", { class: "dtp-buttons" }, remember, swap), words)),
      h("div", { class: "dtp-steer" }, steer.element, place.element, amount.element),
      h("div", { class: "dtp-buttons" }, clear)),
    neuron(name) { neuron.value = name; },
    update({ scene }) {
      for (const { name: part, input } of [...choices, { name: name(), input: becomes.input }]) {
        input.value = scene.parts[part] ?? "";
        input.classList.toggle("dtp-on", part in scene.parts);
        for (const option of input.options) if (option.value === "patch" && option.disabled === Boolean(scene.source)) option.disabled = !scene.source;
      }
      const edited = Object.entries(scene.parts).filter(([part]) => /^L\d+N/.test(part));
      setText(neurons, edited.map(([part, way]) => `${part}: ${WAYS[way]}`).join(", ") || "The table of neurons below ablates to zero.");
      if (scene.source) memory.set(scene.source.state);
      setText(words, scene.source ? `RTG ${signed(scene.source.rtg)}, t ${scene.source.state.t}. Components can be patched from here.` : "No scene is remembered yet; patching takes components from one.");
      swap.disabled = !scene.source;
      clear.disabled = !Object.keys(scene.parts).length && !scene.steer;
      steer.input.value = scene.steer ? scene.steer.direction : "";
      place.input.value = scene.steering.at;
      amount.set(scene.steering.amount);
    },
  };
}

export function preferenceSelect(onchange) {
  const choice = select("Preference", PREFERENCES, onchange);
  return { element: choice.element, update: ({ scene }) => { choice.input.value = scene.preference; } };
}

// Which weights the view maps show: of the embedding, of a head's QK or OV circuit, of a neuron; as they are or in this scene.
export function mapChoice(cfg, onchange) {
  const heads = {};
  for (let l = 0; l < cfg.n_layers; l++)
    for (let head = 0; head < cfg.n_heads; head++)
      Object.assign(heads, { [`L${l}H${head} QK`]: `L${l}H${head} QK: attention to RTG`, [`L${l}H${head} OV`]: `L${l}H${head} OV: onto the preference` });
  const options = (neuron) => ({ embedding: "embedding: onto the preference", ...heads, ...(neuron && { [neuron]: `${neuron}: what it reads` }) });
  const what = select("Map", options(), onchange);
  let now = false;
  const how = radios("Cells show", { weights: "weights", now: "weights × what is there" }, (value) => { now = value === "now"; onchange(); });
  how.set("weights");
  return {
    element: h("div", { class: "dtp-mapchoice" }, what.element, how.element),
    value: () => ({ what: what.input.value, now }),
    neuron(name) { fillSelect(what.input, options(name)); what.input.value = name; },
    unit: () => (what.input.value.endsWith("QK") ? "attention score" : /N/.test(what.input.value) ? "neuron input" : "logits") + (now ? "" : cfg.encoding === "index" ? " per unit of the channel" : ", of what is there"),
  };
}
