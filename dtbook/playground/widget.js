// The widget: what is played, what is changed, and one redraw of everything that follows from it.

import { INTACT, PlaygroundError, contrast, direction, loadModel, run } from "./engine.js";
import { COMPASS, EMPTY, at, contentAt, front, generator, most, observe, reset, roomAt, step, xy } from "./game.js";
import { checkScene, decodeScene, describeScene, encodeScene } from "./scene.js";
import { h, nameOf, signed } from "./draw.js";
import { attentionPanel, contributionPanel, describeChoice, describePlace, mapPanel, neuronPanel, panel, probabilityPanel, scanPanel, viewPanel } from "./panels.js";
import { ACTS, board, button, interventionPanel, mapChoice, playControls, preferenceSelect, presetButtons, select } from "./controls.js";

const DONE = ["turned left", "turned right", "went forward"];
const NEURONS = 8, PAUSE = 250, REST = 400; // rows of the table; milliseconds between steps of the running model, and until a slider rests
const STEERING = { direction: "F-R", at: "resid_pre", amount: 1 }; // what the controls show while nothing is steered

// The weights of an entry: its own, or those of the book's file named after their hash, which is loaded once.
async function weightsOf(entry) {
  if (entry.weights) return entry.weights;
  const kept = () => globalThis.dtbookPlayground?.[entry.id], base = document.documentElement.dataset.content_root;
  if (!kept() && base != null)
    await new Promise((resolve) => {
      const script = h("script", { src: `${base}_static/playground-${entry.id}.js`, onload: resolve, onerror: resolve });
      document.head.append(script);
    });
  if (!kept()) throw new PlaygroundError(`The weights of ${entry.name} could not be loaded; the model shown is still the one before.`);
  return kept();
}

class Widget {
  constructor(host, el) {
    this.host = host;
    this.task = host.get("task");
    this.entries = Object.fromEntries(host.get("models").map((entry) => [entry.name, entry]));
    this.configs = Object.fromEntries(Object.values(this.entries).map(({ name, cfg }) => [name, cfg]));
    this.presets = host.get("presets") ?? [];
    this.loaded = new Map();
    this.ui = { editing: false, cursor: null, running: null, history: [], tool: "obstacle" };
    this.message = h("p", { class: "dtp-message", role: "status" });
    this.root = h("div", { class: "dtp" });
    el.append(h("style", {}, CSS), this.root);
    this.anchor = el.closest(".dtp-host")?.id || "playground"; // what a link to it ends with
  }

  async start() {
    const first = Object.keys(this.entries)[0];
    let complaint = "", scene = null;
    const check = (raw) => checkScene(raw, this.task, this.configs, first);
    try {
      const linked = (/^#(playground(-\d+)?)$/.exec(location.hash)?.[1] ?? "playground") === this.anchor;
      const given = (linked ? new URLSearchParams(location.search).get("scene") : null) ?? this.host.get("scene");
      if (given != null) scene = check(typeof given === "string" ? decodeScene(given) : given);
      if (scene && scene.model !== first) await this.load(scene.model);
    } catch (error) {
      complaint = this.sentence(error);
      scene = null;
    }
    this.load1(first);
    scene ??= check(describeScene(this.task, { ...this.newGame(0), model: first, parts: {}, rtg: 0.9, acting: "greedy", preference: "F-R" }));
    this.scene = { ...scene, over: null, steering: scene.steer ?? STEERING }; // `over` says how the episode ended, if it has
    this.build();
    this.redraw(complaint);
  }

  // An error as a sentence; only a fault of ours has a stack to look at.
  sentence(error) {
    if (error instanceof PlaygroundError) return error.message;
    console.error(error);
    return `Something in the playground failed: ${error.message}.`;
  }

  load1(name) { // the first model's weights are in the page
    if (!this.loaded.has(name)) this.loaded.set(name, loadModel(this.entries[name], this.entries[name].weights));
  }

  async load(name) {
    if (!this.loaded.has(name)) this.loaded.set(name, loadModel(this.entries[name], await weightsOf(this.entries[name])));
  }

  newGame(seed) {
    const random = generator(seed), state = reset(this.task, random);
    return { state, random: random.state };
  }

  // Building

  build() {
    const cfg = this.configs[this.scene.model], on = this.handlers();
    const models = Object.fromEntries(Object.keys(this.entries).map((name) => [name, name]));
    this.modelSelect = select("Model", models, on.model);
    this.choice = mapChoice(cfg, () => this.redraw());
    this.board = board(this.task, on);
    this.controls = playControls(this.task, on);
    const preference = preferenceSelect(on.preference);
    const parts = [this.board, this.controls, viewPanel(), probabilityPanel(), attentionPanel(cfg), contributionPanel(cfg, preference.element), preference,
      interventionPanel(cfg, this.task, this.host.get("mean"), on), scanPanel(), neuronPanel(NEURONS, on.neuron, (name) => { this.choice.neuron(name); this.intervene.neuron(name); this.redraw(`${name} is shown in the map and under Intervene.`); }), mapPanel(cfg, this.choice)];
    this.parts = parts;
    this.watch();
    this.intervene = parts[7];
    const [room, controls, seen, probabilities, attention, contributions, , interventions, scans, neurons, maps] = parts.map((part) => part.element);
    const help = h("p", { class: "dtp-note dtp-help" }, "Keys on the board: arrows play, m model step, r run, u undo, e edit.");
    this.root.replaceChildren(
      h("div", { class: "dtp-top" }, this.modelSelect.element, button("Copy link", on.copy)),
      presetButtons(this.presets, on.preset),
      this.message,
      h("div", { class: "dtp-columns" },
        h("div", { class: "dtp-column" }, panel("game", "The game", room, help, controls)),
        h("div", { class: "dtp-column" }, h("div", { class: "dtp-pair" }, seen, h("div", {}, probabilities, attention)), contributions)),
      interventions,
      h("div", { class: "dtp-columns" }, h("div", { class: "dtp-column" }, scans), h("div", { class: "dtp-column" }, neurons)),
      maps);
  }

  // Which parts are out of sight, and which of them are behind the scene.
  watch() {
    const away = this.away = new Set(), parts = new Map(this.parts.map((part) => [part.element, part]));
    this.behind = new Set();
    this.watcher?.disconnect();
    this.watcher = new IntersectionObserver((seen) => seen.forEach(({ target, isIntersecting }) => away[isIntersecting ? "delete" : "add"](parts.get(target))));
    for (const element of parts.keys()) this.watcher.observe(element);
  }

  // What is in sight is drawn at once; the rest, its own computations included, as soon as a browser has painted that.
  draw(frame) {
    this.frame = frame;
    const waits = this.behind.size > 0;
    for (const part of this.parts) {
      this.behind[this.away.has(part) ? "add" : "delete"](part);
      if (!this.away.has(part)) part.update(frame);
    }
    if (waits || !this.behind.size) return;
    requestAnimationFrame(() => setTimeout(() => {
      const late = [...this.behind];
      this.behind.clear(); // first: a part that fails must not keep the others from ever being drawn again
      for (const part of late) part.update(this.frame);
    }));
  }

  // Everything that follows from the scene, drawn; `say` goes to the status line: a sentence, a function that makes one of
  // what the model would do, or "" for the scene in words.
  redraw(say, lead = "") {
    const { scene, ui, task } = this, model = this.loaded.get(scene.model);
    const input = { view: observe(task, scene.state), rtg: scene.rtg, t: Math.min(scene.state.t, model.cfg.max_steps) };
    const before = run(model, input), edits = this.edits(model);
    const after = edits === INTACT ? null : run(model, input, edits), last = after ?? before;
    this.result = last;
    this.root.classList.toggle("dtp-edited", Boolean(after));
    const choice = describeChoice(last.probs), place = `${describePlace(task, scene.state, input.view)} ${choice}`;
    const frame = { scene, task, model, input, edits, before, after, weights: contrast(scene.preference), place,
      cursor: ui.editing ? ui.cursor : null, editing: ui.editing, running: Boolean(ui.running), canUndo: ui.history.length > 0 };
    this.draw(frame);
    this.modelSelect.input.value = scene.model;
    if (say !== undefined) this.say(say instanceof Function ? say(choice) : say || `${lead}Step ${scene.state.t}. ${place}`);
  }

  say(sentence) {
    clearTimeout(this.ui.saying);
    this.message.textContent = sentence;
  }

  // What a slider says, once it rests: a reader who drags it is not talked to all the way.
  sayLater(sentence) {
    clearTimeout(this.ui.saying);
    this.ui.saying = setTimeout(() => this.say(sentence(describeChoice(this.result.probs))), REST);
  }

  edits(model) {
    const { parts, steer, source } = this.scene;
    if (!Object.keys(parts).length && !steer) return INTACT;
    const patched = Object.values(parts).includes("patch");
    const from = patched ? run(model, { view: observe(this.task, source.state), rtg: source.rtg, t: source.state.t }) : null;
    return { parts, source: from, steer: steer && { vector: direction(model, steer.direction), amount: steer.amount, at: steer.at } };
  }

  // Changing

  // A change that undo takes back, the moves of one slider together. A new state is a new episode, unless `scene` says it is over.
  change(scene, say, { lead, slider } = {}) {
    const { ui } = this;
    if (!slider || slider !== ui.slider) ui.history = [...ui.history.slice(-499), this.scene];
    ui.slider = slider;
    this.put({ ...this.scene, ...(scene.state && { over: null }), ...scene }, say, lead);
  }

  put(scene, say, lead) {
    const rebuild = !this.alike(scene.model);
    this.scene = scene;
    if (rebuild) this.build();
    this.redraw(say, lead);
    this.host.set("scene", describeScene(this.task, this.scene)); // a live kernel's copy, where there is one
    this.host.save_changes();
  }

  // Whether a model has the components of the one that is shown.
  alike(name) {
    const shape = (of) => JSON.stringify({ ...this.configs[of], init: null }); // of the same components, wherever training began
    return name === this.scene.model || shape(name) === shape(this.scene.model);
  }

  play(action, random, who) {
    if (this.scene.over) return this.redraw("The episode is over: undo, edit the room or begin a new game.");
    const { state, reward, terminated, truncated } = step(this.task, this.scene.state, action, random);
    const over = !(terminated || truncated) ? null
      : reward > 0 ? `The goal is reached at step ${state.t}: return ${reward.toFixed(3)}.`
      : reward < 0 ? `It walked into ${nameOf(contentAt(this.task, this.scene.state, ...front(this.task, this.scene.state)))} at step ${state.t}: return −1.`
      : `Step ${state.t}: the episode is cut off. Return 0.`;
    const next = over && state.t >= this.task.max_steps ? { ...state, t: this.task.max_steps - 1 } : state;
    if (over) this.stop();
    const quiet = this.ui.running && !over; // a running model would talk without end
    this.change({ state: next, random: random.state, over }, quiet ? undefined : over ? `${who} ${DONE[action]}. ${over}` : "", { lead: `${who} ${DONE[action]}. ` });
  }

  modelStep() {
    const random = generator(this.scene.random), { probs } = this.result;
    let action = probs.indexOf(Math.max(...probs));
    if (this.scene.acting === "sampled") {
      const word = random();
      action = word < probs[0] ? 0 : word < probs[0] + probs[1] ? 1 : 2;
    }
    this.play(action, random, "The model");
  }

  stop() {
    clearInterval(this.ui.running);
    this.ui.running = null;
  }

  // The room is edited at (x, y): the agent turns, obstacles come and go, and walls and the goal stay.
  edit(x, y) {
    const { task, scene } = this, { state } = scene, cell = at(task, x, y);
    const place = (changed, say) => { this.stop(); this.change({ state: { ...state, ...changed } }, say); };
    if ((cell === state.agent || this.ui.tool !== "agent") && this.onGoal()) return;
    if (cell === state.agent) return place({ direction: (state.direction + 1) % 4 }, `The agent faces ${COMPASS[(state.direction + 1) % 4]}.`);
    if (roomAt(task, x, y) !== EMPTY) return this.redraw("Walls and the goal stay where they are.");
    if (this.ui.tool === "agent") {
      if (state.obstacles.includes(cell)) return this.redraw("An obstacle is there: take it away first.");
      return place({ agent: cell }, `The agent is at column ${x}, row ${y}.`);
    }
    if (state.obstacles.includes(cell)) return place({ obstacles: state.obstacles.filter((c) => c !== cell) }, `The obstacle at column ${x}, row ${y} is gone.`);
    if (state.obstacles.length >= most(task)) return this.redraw(`This room holds at most ${most(task)} obstacles: take one away first.`);
    return place({ obstacles: [...state.obstacles, cell] }, `An obstacle is at column ${x}, row ${y}.`);
  }

  // On the goal the episode is over: no scene begins there.
  onGoal() {
    const done = roomAt(this.task, ...xy(this.task, this.scene.state.agent)) !== EMPTY;
    if (done) this.redraw("The agent is on the goal, where no scene begins: undo the last step first.");
    return done;
  }

  async copy() {
    if (this.onGoal()) return;
    const code = encodeScene(describeScene(this.task, this.scene));
    const inBook = document.documentElement.dataset.content_root != null;
    const text = inBook ? `${location.href.split(/[?#]/)[0]}?scene=${code}#${this.anchor}` : code;
    try {
      await navigator.clipboard.writeText(text);
      this.redraw(inBook ? "The link to this scene is copied." : `This scene is copied as text: show(model, scene="…") begins with it.`);
    } catch {
      this.redraw(`Copying is not allowed here; this is it: ${text}`);
    }
    this.copied = text;
  }

  async setModel(name) {
    this.stop();
    try {
      await this.load(name);
      const parts = this.alike(name) ? this.scene.parts : {}; // else there are other components to edit
      this.change({ model: name, parts }, (choice) => `This is ${name}. ${choice}`);
    } catch (error) {
      this.redraw(this.sentence(error));
    }
  }

  async setPreset({ name, note = "", scene }) {
    this.stop();
    try {
      const checked = checkScene(scene, this.task, this.configs, this.scene.model);
      await this.load(checked.model);
      this.change({ ...checked, steering: checked.steer ?? this.scene.steering }, `${name}. ${note}`);
    } catch (error) {
      this.redraw(this.sentence(error));
    }
  }

  handlers() {
    const { ui } = this, set = (changes, say) => this.change(changes, say);
    const slide = (slider, changes, say) => { this.change(changes, undefined, { slider }); this.sayLater((choice) => `${say} ${choice}`); };
    return {
      act: (action) => { this.stop(); this.play(action, generator(this.scene.random), "You"); },
      step: () => { this.stop(); this.modelStep(); },
      run: () => {
        if (ui.running) { this.stop(); return this.redraw(""); }
        ui.running = setInterval(() => this.modelStep(), PAUSE);
        this.redraw("The model plays.");
      },
      undo: () => {
        const last = ui.history.pop();
        if (!last) return;
        this.stop();
        ui.slider = null;
        this.put(last, "");
      },
      reset: () => {
        this.stop();
        const text = this.controls.seed(), seed = Number(text);
        if (text === "" || !Number.isInteger(seed) || seed < 0 || seed >= 2 ** 32) return this.redraw(`Seed must be a whole number from 0 to ${2 ** 32 - 1}, not “${text}”.`);
        set(this.newGame(seed), "");
      },
      editing: () => ui.editing,
      tool: (tool) => { ui.tool = tool; },
      edit: () => {
        this.stop();
        ui.editing = !ui.editing;
        ui.cursor = this.scene.state.agent;
        this.redraw(ui.editing ? "Editing: arrow keys move the yellow cursor; space places or removes an obstacle, or turns the agent; escape ends it." : "");
      },
      cursor: (dx, dy) => {
        const [x, y] = xy(this.task, ui.cursor), clamp = (v) => Math.min(Math.max(v, 1), this.task.size - 2);
        ui.cursor = at(this.task, clamp(x + dx), clamp(y + dy));
        const [cx, cy] = xy(this.task, ui.cursor);
        this.redraw(`Column ${cx}, row ${cy}: ${ui.cursor === this.scene.state.agent ? "the agent" : nameOf(contentAt(this.task, this.scene.state, cx, cy))}.`);
      },
      place: () => this.edit(...xy(this.task, ui.cursor)),
      click: (x, y) => { if (ui.editing) ui.cursor = at(this.task, x, y); this.edit(x, y); },
      rtg: (rtg) => slide("rtg", { rtg }, `RTG ${signed(rtg)}.`),
      t: (t) => this.onGoal() || slide("t", { state: { ...this.scene.state, t } }, `Timestep ${t}.`),
      acting: (acting) => set({ acting }, (choice) => `It now takes ${ACTS[acting]}. ${choice}`),
      preference: (preference) => set({ preference }, `The contributions are to ${preference}.`),
      model: (name) => this.setModel(name),
      preset: (preset) => this.setPreset(preset),
      copy: () => this.copy(),
      part: (name, way) => {
        const { [name]: _, ...parts } = this.scene.parts;
        set({ parts: way ? { ...parts, [name]: way } : parts }, "");
      },
      neuron: (name, ablated) => {
        const { [name]: _, ...parts } = this.scene.parts;
        set({ parts: ablated ? { ...parts, [name]: "zero" } : parts }, "");
      },
      show: () => this.redraw(),
      noNeuron: (name) => this.redraw(`This model has no neuron “${name}”: they run from L0N0 to L${this.configs[this.scene.model].n_layers - 1}N${this.configs[this.scene.model].d_mlp - 1}.`),
      remember: () => this.onGoal() || set({ source: { state: this.scene.state, rtg: this.scene.rtg } }, "This scene is remembered."),
      swap: () => this.onGoal() || set({ ...this.scene.source, source: { state: this.scene.state, rtg: this.scene.rtg } }, ""),
      clear: () => set({ parts: {}, steer: null }, ""),
      steer: (changes) => {
        const steering = { ...this.scene.steering, ...changes }, steer = changes.direction ?? this.scene.steer ? steering : null; // a direction of "" is none
        if (changes.amount == null) return set({ steering, steer }, "");
        slide("amount", { steering, steer }, steer ? `Steering by ${signed(steering.amount, 1)}.` : "Steering is off.");
      },
    };
  }
}

export function render({ model, el }) {
  const widget = new Widget(model, el);
  el.playground = widget; // for those who look inside
  return widget.start().catch((error) => widget.root.replaceChildren(h("p", { role: "alert", class: "dtp-message" }, widget.sentence(error))));
}

export default { render };
