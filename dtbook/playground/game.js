// The rules of Dynamic Obstacles, as dtbook/gridworld/rules.py has them. A state is { agent, direction, obstacles, t }: cells are
// numbers x + size·y, directions 0 to 3 are east, south, west, north, t is the step. Functions leave their inputs alone.

export const EMPTY = 1, WALL = 2, OBSTACLE = 6, GOAL = 8; // minigrid's object indices
const COLOUR = { [EMPTY]: 0, [WALL]: 5, [OBSTACLE]: 2, [GOAL]: 1 };
export const COMPASS = ["east", "south", "west", "north"];
export const VIEW = 7;
const AHEAD = [[1, 0], [0, 1], [-1, 0], [0, -1]];

// Random numbers in [0, 1): `random()`, and `random.state`: 32 bits that say how they go on
// (a Weyl sequence through a 32-bit hash of github.com/skeeto/hash-prospector).
export function generator(state) {
  const random = () => {
    random.state = (random.state + 0x9e3779b9) >>> 0;
    let z = random.state;
    z = Math.imul(z ^ (z >>> 16), 0x21f0aaad);
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
    return ((z ^ (z >>> 15)) >>> 0) / 2 ** 32;
  };
  random.state = state >>> 0;
  return random;
}

export const most = (task) => Math.floor(task.size / 2) + 1; // obstacles that a Task can have
export const at = (task, x, y) => x + task.size * y;
export const xy = (task, cell) => [cell % task.size, Math.floor(cell / task.size)];

// What stands at (x, y) of the empty room; beyond it there is wall.
export function roomAt({ size }, x, y) {
  if (x < 1 || y < 1 || x > size - 2 || y > size - 2) return WALL;
  return x === size - 2 && y === size - 2 ? GOAL : EMPTY;
}

export function contentAt(task, state, x, y) {
  const thing = roomAt(task, x, y);
  return thing === EMPTY && state.obstacles.includes(at(task, x, y)) ? OBSTACLE : thing;
}

export function front(task, { agent, direction }) {
  const [x, y] = xy(task, agent), [dx, dy] = AHEAD[direction];
  return [x + dx, y + dy];
}

// The agent's view, image[i, j, channel] at 21·i + 3·j + channel, as `gridworld.observe`; its own cell is shown empty.
export function observe(task, state) {
  const view = new Uint8Array(VIEW * VIEW * 3);
  for (let i = 0; i < VIEW; i++)
    for (let j = 0; j < VIEW; j++) {
      const own = i === 3 && j === 6, thing = own ? EMPTY : contentAt(task, state, ...cellOfView(task, state, i, j));
      view.set([thing, COLOUR[thing], 0], 3 * (VIEW * i + j));
    }
  return view;
}

// The cell (x, y) of the room that is i from the left and j from the top of the agent's view.
export function cellOfView(task, { agent, direction }, i, j) {
  const [x, y] = xy(task, agent), [dx, dy] = AHEAD[direction], right = i - 3, ahead = 6 - j;
  return [x + ahead * dx - right * dy, y + ahead * dy + right * dx];
}

export function reset(task, random) {
  const free = [];
  for (let cell = 0; cell < task.size ** 2; cell++) if (roomAt(task, ...xy(task, cell)) === EMPTY) free.push(cell);
  const draw = () => free.splice(Math.floor(random() * free.length), 1)[0];
  const direction = task.random_start ? Math.floor(random() * 4) : 0;
  const agent = task.random_start ? draw() : free.shift();
  return { agent, direction, obstacles: Array.from({ length: task.n_obstacles }, draw), t: 0 };
}

// One step: { state, reward, terminated, truncated }. "In front" costs by what was there before the obstacles moved.
export function step(task, state, action, random) {
  const ahead = front(task, state), forward = action === 2;
  const blocked = (now) => [WALL, OBSTACLE].includes(contentAt(task, now, ...ahead));
  const hit = forward && blocked(state);
  const moved = { ...state, obstacles: moveObstacles(task, state, random), t: state.t + 1 };
  if (!forward) moved.direction = (state.direction + (action === 0 ? 3 : 1)) % 4;
  else if (!blocked(moved)) moved.agent = at(task, ...ahead);
  const goal = forward && roomAt(task, ...ahead) === GOAL;
  const reward = goal ? 1 - 0.9 * (moved.t / task.max_steps) : hit ? -1 : 0;
  return { state: moved, reward, terminated: goal || hit, truncated: moved.t >= task.max_steps };
}

// Each obstacle in turn goes to a free cell around it, each as likely; minigrid gives up after 101 draws from the nine.
function moveObstacles(task, state, random) {
  const obstacles = [...state.obstacles];
  obstacles.forEach((cell, k) => {
    const [x, y] = xy(task, cell), free = [];
    for (let dy = -1; dy <= 1; dy++)
      for (let dx = -1; dx <= 1; dx++) {
        const other = at(task, x + dx, y + dy);
        if (roomAt(task, x + dx, y + dy) === EMPTY && other !== state.agent && !obstacles.includes(other)) free.push(other);
      }
    const word = random() * free.length, pick = Math.floor(word);
    if (word - pick >= ((9 - free.length) / 9) ** 101) obstacles[k] = free[pick];
  });
  return obstacles;
}
