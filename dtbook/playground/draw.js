// Pictures as SVG and DOM: cells as minigrid draws them, bars, curves, view maps. Nothing here knows the model.

import { CELL_CODES } from "./engine.js";
import { EMPTY, GOAL, OBSTACLE, VIEW, WALL, cellOfView, contentAt, xy } from "./game.js";

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

export const svg = (width, height, label, inner, extra = "") =>
  `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${label}" ${extra}>${inner}</svg>`;
export const signed = (value, digits = 2) => {
  const text = Math.abs(value).toFixed(digits);
  return (value < 0 && Number(text) ? "−" : "") + text;
};
export const percent = (value) => `${(100 * value).toFixed(value > 0.0005 && value < 0.1 ? 1 : 0)} %`;

const TILE = 32, THING = { [WALL]: "#646464", [GOAL]: "#00ff00" };

// One tile of minigrid's `Grid.render_tile`: lines above and to the left, the thing, the agent, then the highlight.
function tile(x, y, thing, direction, seen) {
  const left = x * TILE, top = y * TILE, line = 0.031 * TILE;
  const box = (width, height, fill, more = "") => `<rect x="${left}" y="${top}" width="${width}" height="${height}" fill="${fill}"${more}/>`;
  let inner = box(line, TILE, "#646464") + box(TILE, line, "#646464");
  if (THING[thing]) inner = box(TILE, TILE, THING[thing]);
  if (thing === OBSTACLE) inner += `<circle cx="${left + TILE / 2}" cy="${top + TILE / 2}" r="${0.31 * TILE}" fill="#0000ff"/>`;
  if (direction != null) {
    const points = [[0.12, 0.19], [0.87, 0.5], [0.12, 0.81]].map(([a, b]) => `${left + a * TILE},${top + b * TILE}`).join(" ");
    inner += `<polygon points="${points}" fill="#ff0000" transform="rotate(${90 * direction} ${left + TILE / 2} ${top + TILE / 2})"/>`;
  }
  return inner + (seen ? box(TILE, TILE, "#fff", ' fill-opacity=".3"') : "");
}

// The room, what the agent sees of it highlighted; `cursor` is the cell that the keyboard edits.
export function roomPicture(task, state, cursor) {
  const { size } = task, seen = new Set(), [ax, ay] = xy(task, state.agent);
  for (let i = 0; i < VIEW; i++) for (let j = 0; j < VIEW; j++) seen.add(String(cellOfView(task, state, i, j)));
  let inner = `<rect width="${size * TILE}" height="${size * TILE}" fill="#000"/>`;
  for (let y = 0; y < size; y++)
    for (let x = 0; x < size; x++)
      inner += tile(x, y, contentAt(task, state, x, y), x === ax && y === ay ? state.direction : null, seen.has(String([x, y])));
  if (cursor != null) {
    const [x, y] = xy(task, cursor), box = `x="${x * TILE + 1.5}" y="${y * TILE + 1.5}" width="${TILE - 3}" height="${TILE - 3}" fill="none"`;
    inner += `<rect ${box} stroke="#000" stroke-width="5"/><rect ${box} stroke="#ffd54a" stroke-width="2.5"/>`;
  }
  return svg(size * TILE, size * TILE, "the room", inner, 'aria-hidden="true"');
}

export const thingsInView = (view) => {
  const count = (thing) => Array.from({ length: 49 }, (_, k) => view[3 * k]).filter((seen) => seen === thing).length;
  return { front: nameOf(view[3 * 26]), obstacles: count(OBSTACLE), goal: count(GOAL) > 0 };
};
export const nameOf = (thing) => Object.keys(CELL_CODES).find((name) => CELL_CODES[name][0] === thing) ?? `thing ${thing}`;

// What the agent sees, drawn as minigrid's `get_pov_render`: all of it highlighted, the agent below the middle, facing up.
export function viewPicture(view, label) {
  let inner = `<rect width="${VIEW * TILE}" height="${VIEW * TILE}" fill="#000"/>`;
  for (let i = 0; i < VIEW; i++)
    for (let j = 0; j < VIEW; j++)
      inner += tile(i, j, view[3 * (VIEW * i + j)], i === 3 && j === 6 ? 3 : null, true);
  return svg(VIEW * TILE, VIEW * TILE, label, inner);
}

// A 7×7 map of one channel in the diverging colours, centred on 0; the front cell and the agent's own are outlined.
export function mapPicture(values, limit, label) {
  const unit = 20;
  let inner = "";
  for (let i = 0; i < VIEW; i++)
    for (let j = 0; j < VIEW; j++) {
      const value = values[VIEW * i + j], share = limit ? Math.min(Math.abs(value) / limit, 1) : 0;
      inner += `<rect x="${i * unit}" y="${j * unit}" width="${unit}" height="${unit}" class="${value < 0 ? "neg" : "pos"}" fill-opacity="${share.toFixed(3)}"><title>${i}, ${j}: ${signed(value, 3)}</title></rect>`;
    }
  const frame = (i, j, more) => `<rect x="${i * unit + 1}" y="${j * unit + 1}" width="${unit - 2}" height="${unit - 2}" class="frame" ${more}/>`;
  const side = VIEW * unit, edge = `<rect x=".5" y=".5" width="${side - 1}" height="${side - 1}" class="edge"/>`;
  return svg(side, side, label, inner + edge + frame(3, 5, "") + frame(3, 6, 'stroke-dasharray="3 2"'));
}

// Curves of three probabilities over RTG, before (solid) and after (dashed) an intervention.
export function scanPicture(rtgs, before, after, rtg, label) {
  const W = 340, H = 190, box = { left: 34, right: 8, top: 8, bottom: 30 };
  const x = (value) => box.left + ((value + 1) / 2) * (W - box.left - box.right);
  const y = (value) => H - box.bottom - value * (H - box.top - box.bottom);
  let inner = [0, 0.5, 1].map((p) => `<line x1="${box.left}" x2="${W - box.right}" y1="${y(p)}" y2="${y(p)}" class="grid"/><text x="${box.left - 6}" y="${y(p) + 4}" text-anchor="end">${p}</text>`).join("");
  inner += [-1, -0.5, 0, 0.5, 1].map((r) => `<text x="${x(r)}" y="${H - 12}" text-anchor="middle">${signed(r, r % 1 ? 1 : 0)}</text>`).join("");
  inner += `<text x="${W - box.right}" y="${H - 1}" text-anchor="end">RTG</text><line x1="${x(rtg)}" x2="${x(rtg)}" y1="${y(0)}" y2="${y(1)}" class="now"/>`;
  const path = (probs, k) => probs.map((row, n) => `${n ? "L" : "M"}${x(rtgs[n]).toFixed(1)},${y(row[k]).toFixed(1)}`).join("");
  for (let k = 0; k < 3; k++) {
    inner += `<path d="${path(before, k)}" class="curve action-${k}"/>`;
    if (after) inner += `<path d="${path(after, k)}" class="curve action-${k} after"/>`;
  }
  return svg(W, H, label, inner);
}
