// Pictures as SVG and DOM: cells as minigrid draws them, bars, curves, view maps. Nothing here knows the model.

import { CELL_CODES } from "./engine.js";
import { GOAL, OBSTACLE, VIEW, WALL, cellOfView, contentAt, xy } from "./game.js";

// h("p", { class: "x", onclick }, "text", child): an element.
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

// Sets what has changed and nothing else: a browser lays out and paints anew whatever is touched.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
export function setAttribute(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

// An SVG of pieces, of which `set(pieces, label)` draws those anew that differ from before. Without a label it is silent.
export function canvas(width, height) {
  const box = h("div"), drawn = [];
  box.innerHTML = `<svg viewBox="0 0 ${width} ${height}" aria-hidden="true"></svg>`;
  const element = box.firstChild;
  return {
    element,
    set(pieces, label) {
      pieces.forEach((piece, k) => {
        if (piece === drawn[k]) return;
        if (k === element.childElementCount) element.insertAdjacentHTML("beforeend", "<g></g>");
        element.children[k].innerHTML = drawn[k] = piece;
      });
      if (!label) return;
      setAttribute(element, "aria-label", label);
      setAttribute(element, "role", "img");
      element.removeAttribute("aria-hidden");
    },
  };
}
export const signed = (value, digits = 2) => {
  const text = Math.abs(value).toFixed(digits);
  return (value < 0 && Number(text) ? "−" : "") + text;
};
export const percent = (value) => `${(100 * value).toFixed(value > 0.0005 && value < 0.1 ? 1 : 0)} %`;

const TILE = 32, GREY = "#646464", GREEN = "#00ff00";
const square = ([x, y]) => `M${x * TILE} ${y * TILE}h${TILE}v${TILE}h-${TILE}z`;
const path = (d, fill, more = "") => (d ? `<path d="${d}" fill="${fill}"${more}/>` : "");

// size × size tiles as minigrid's `Grid.render_tile` paints them, in layers: black, lines above and to the left of each tile,
// what stands in it, the agent, and the highlight of what it sees. One path a layer: a browser pays for every element.
function tiles(size, things, agent, direction, seen) {
  const all = Array.from({ length: size }, (_, k) => k), line = 0.031 * TILE, side = size * TILE;
  const lines = all.map((k) => `M${k * TILE} 0h${line}v${side}h-${line}zM0 ${k * TILE}h${side}v${line}h-${side}z`).join("");
  const of = (thing) => things.filter((one) => one.thing === thing).map((one) => one.place);
  const ball = ([x, y]) => `<circle cx="${(x + 0.5) * TILE}" cy="${(y + 0.5) * TILE}" r="${0.31 * TILE}" fill="#0000ff"/>`;
  const [x, y] = agent, points = [[0.12, 0.19], [0.87, 0.5], [0.12, 0.81]].map(([a, b]) => `${(x + a) * TILE},${(y + b) * TILE}`).join(" ");
  return [
    path(`M0 0h${side}v${side}h-${side}z`, "#000") + `<path d="${lines}" fill="${GREY}"/>`,
    path(of(WALL).map(square).join(""), GREY) + path(of(GOAL).map(square).join(""), GREEN),
    of(OBSTACLE).map(ball).join(""),
    `<polygon points="${points}" fill="#ff0000" transform="rotate(${90 * direction} ${(x + 0.5) * TILE} ${(y + 0.5) * TILE})"/>`,
    path(seen.map(square).join(""), "#fff", ' fill-opacity=".3"'),
  ];
}

const grid = (width, height, at) => Array.from({ length: width * height }, (_, k) => at(k % width, Math.floor(k / width)));

// The room, what the agent sees of it highlighted; `cursor` is the cell that the keyboard edits.
export function roomPicture(task) {
  const { size } = task, { element, set } = canvas(size * TILE, size * TILE);
  return {
    element,
    set(state, cursor) {
      const things = grid(size, size, (x, y) => ({ place: [x, y], thing: contentAt(task, state, x, y) }));
      const seen = grid(VIEW, VIEW, (i, j) => cellOfView(task, state, i, j)).filter((place) => place.every((k) => k >= 0 && k < size));
      set([...tiles(size, things, xy(task, state.agent), state.direction, seen), cursor == null ? "" : cursorMark(task, cursor)]);
    },
  };
}

function cursorMark(task, cursor) {
  const [x, y] = xy(task, cursor), box = `x="${x * TILE + 1.5}" y="${y * TILE + 1.5}" width="${TILE - 3}" height="${TILE - 3}" fill="none"`;
  return `<rect ${box} stroke="#000" stroke-width="5"/><rect ${box} stroke="#ffd54a" stroke-width="2.5"/>`;
}

export const thingsInView = (view) => {
  const count = (thing) => Array.from({ length: 49 }, (_, k) => view[3 * k]).filter((seen) => seen === thing).length;
  return { front: nameOf(view[3 * 26]), obstacles: count(OBSTACLE), goal: count(GOAL) > 0 };
};
export const nameOf = (thing) => Object.keys(CELL_CODES).find((name) => CELL_CODES[name][0] === thing) ?? `thing ${thing}`;

// What the agent sees, drawn as minigrid's `get_pov_render`: all of it highlighted, the agent below the middle, facing up.
export function viewPicture() {
  const { element, set } = canvas(VIEW * TILE, VIEW * TILE);
  return {
    element,
    set(view, label) {
      const things = grid(VIEW, VIEW, (i, j) => ({ place: [i, j], thing: view[3 * (VIEW * i + j)] }));
      set(tiles(VIEW, things, [3, 6], 3, grid(VIEW, VIEW, (i, j) => [i, j])), label);
    },
  };
}

// A 7×7 map of one channel in the diverging colours, centred on 0; the front cell and the agent's own are outlined.
export function mapPicture() {
  const unit = 20, side = VIEW * unit, { element, set } = canvas(side, side);
  const at = (k) => [Math.floor(k / VIEW), k % VIEW];
  const frame = (i, j, more) => `<rect x="${i * unit + 1}" y="${j * unit + 1}" width="${unit - 2}" height="${unit - 2}" class="frame" ${more}/>`;
  const cell = ([i, j]) => `<rect x="${i * unit}" y="${j * unit}" width="${unit}" height="${unit}"><title></title></rect>`;
  const edge = `<rect x=".5" y=".5" width="${side - 1}" height="${side - 1}" class="edge"/>`;
  const all = Array.from({ length: VIEW ** 2 }, (_, k) => at(k)), words = (k) => `${all[k].join(", ")}: ${signed(shown[k], 3)}`;
  const pieces = [all.map(cell).join(""), edge + frame(3, 5, "") + frame(3, 6, 'stroke-dasharray="3 2"')];
  set(pieces);
  const cells = [...element.firstChild.children];
  let shown = [];
  element.addEventListener("pointerover", ({ target }) => { // a cell's number is written when it is pointed at
    const k = cells.indexOf(target);
    if (k >= 0) setText(target.firstChild, words(k));
  });
  return {
    element,
    set(values, limit, label) {
      shown = values;
      cells.forEach((rect, k) => {
        setAttribute(rect, "class", values[k] < 0 ? "neg" : "pos");
        setAttribute(rect, "fill-opacity", limit ? Math.min(Math.abs(values[k]) / limit, 1).toFixed(2) : "0");
      });
      set(pieces, label);
    },
  };
}

// Curves of three probabilities over RTG, before (solid) and after (dashed) an intervention.
export function scanPicture() {
  const W = 340, H = 190, box = { left: 34, right: 8, top: 8, bottom: 30 };
  const x = (value) => box.left + ((value + 1) / 2) * (W - box.left - box.right);
  const y = (value) => H - box.bottom - value * (H - box.top - box.bottom);
  const { element, set } = canvas(W, H);
  let axes = [0, 0.5, 1].map((p) => `<line x1="${box.left}" x2="${W - box.right}" y1="${y(p)}" y2="${y(p)}" class="grid"/><text x="${box.left - 6}" y="${y(p) + 4}" text-anchor="end">${p}</text>`).join("");
  axes += [-1, -0.5, 0, 0.5, 1].map((r) => `<text x="${x(r)}" y="${H - 12}" text-anchor="middle">${signed(r, r % 1 ? 1 : 0)}</text>`).join("");
  axes += `<text x="${W - box.right}" y="${H - 1}" text-anchor="end">RTG</text>`;
  const line = (rtgs, probs, k) => probs.map((row, n) => `${n ? "L" : "M"}${x(rtgs[n]).toFixed(1)},${y(row[k]).toFixed(1)}`).join("");
  const curve = (rtgs, probs, k, more) => (probs ? `<path d="${line(rtgs, probs, k)}" class="curve action-${k}${more}"/>` : "");
  return {
    element,
    set(rtgs, before, after, rtg, label) {
      const now = `<line x1="${x(rtg)}" x2="${x(rtg)}" y1="${y(0)}" y2="${y(1)}" class="now"/>`;
      set([axes, now, ...[0, 1, 2].flatMap((k) => [curve(rtgs, before, k, ""), curve(rtgs, after, k, " after")])], label);
    },
  };
}
