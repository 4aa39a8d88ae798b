"""An observation as a view without obstacles and its obstacles: a few dozen of each make up the whole population.

What is linear in an observation is then a sum over these parts (`analysis.population`). They are found in the images
themselves, so any size of room, number and colour of obstacles, place of the goal and other task will do.
"""

from dataclasses import dataclass
from typing import no_type_check

import numpy as np
from jaxtyping import Int32, UInt8

from dtbook.gridworld.kernels import EMPTY, OBSTACLE, compiled

EMPTY_CELL = (EMPTY, 0, 0)
"""An empty cell as minigrid shows it: object, colour, state."""


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of n observations. Indexed by rows, it is those of these observations."""

    views: UInt8[np.ndarray, "view side side 3"]
    """The distinct observations with every obstacle's cell empty, in the order in which they are first met."""
    obstacles: UInt8[np.ndarray, "obstacle 4"]
    """The distinct obstacles: column and row of the view, colour, state."""
    view: Int32[np.ndarray, " n"]
    """Which view each observation is."""
    obstacle: Int32[np.ndarray, "n most"]
    """Which obstacles are added to it, −1 where there are no more. First come those that the observation before has as
    well, as far as they go, so that neighbours share the beginning of their sums."""

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, rows: slice | np.ndarray) -> "Parts":
        return Parts(self.views, self.obstacles, self.view[rows], self.obstacle[rows])


def take_apart(images: UInt8[np.ndarray, "n side side 3"]) -> Parts:
    """Return the parts of each observation; view + obstacles gives the image back, byte for byte."""
    n, side = len(images), images.shape[1]
    cells = np.ascontiguousarray(images).reshape(n, side * side, 3)
    obstacle = np.full((n, _most_obstacles(cells)), -1, np.int32)
    keys = np.random.default_rng(0).integers(2**64, size=(side * side, 3), dtype=np.uint64)
    known = np.full((side * side) << 16, -1, np.int32)
    prints, codes = np.empty(n, np.uint64), np.empty(len(known), np.int32)
    codes = codes[: _find_obstacles(cells, keys, known, prints, codes, obstacle)]
    first, view = _distinct(prints)
    views = images[first].copy()
    views[views[..., 0] == OBSTACLE] = EMPTY_CELL
    (column, row), what = np.divmod(codes >> 16, side), codes & 0xFFFF
    obstacles = np.stack([column, row, what >> 8, what & 0xFF], 1).astype(np.uint8)
    return Parts(views, obstacles, view, obstacle)


def _distinct(prints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each distinct number is first, in order, and which of them each is; neighbours are often alike."""
    starts = np.flatnonzero(np.concatenate([[True], prints[1:] != prints[:-1]])[: len(prints)])
    _, first, which = np.unique(prints[starts], return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order))
    lengths = np.diff(np.concatenate([starts, [len(prints)]]))
    return starts[first[order]], np.repeat(rank[which], lengths)


@compiled
@no_type_check
def _most_obstacles(cells: np.ndarray) -> int:
    most = 0
    for i in range(len(cells)):
        seen = 0
        for c in range(cells.shape[1]):
            seen += cells[i, c, 0] == OBSTACLE
        most = max(most, seen)
    return most


@compiled
@no_type_check
def _find_obstacles(
    cells: np.ndarray,
    keys: np.ndarray,
    known: np.ndarray,
    prints: np.ndarray,
    codes: np.ndarray,
    obstacle: np.ndarray,
) -> int:
    """Write each observation's obstacles, and a fingerprint of the rest; return how many obstacles there are.

    An obstacle's code is its cell, colour and state in one number; `known` is its place in `codes`. A fingerprint is
    the sum of the bytes times random keys, modulo 2⁶⁴: among a million views, two share one with probability 3e-8.
    """
    n_codes = 0
    seen = np.empty(obstacle.shape[1], np.int32)
    for i in range(len(cells)):
        total, n_seen = np.uint64(0), 0
        for c in range(cells.shape[1]):
            if cells[i, c, 0] == OBSTACLE:
                code = (c << 16) + (np.int32(cells[i, c, 1]) << 8) + cells[i, c, 2]
                if known[code] < 0:
                    known[code] = n_codes
                    codes[n_codes] = code
                    n_codes += 1
                seen[n_seen] = known[code]
                n_seen += 1
                total += np.uint64(EMPTY) * keys[c, 0]
            else:
                for channel in range(3):
                    total += np.uint64(cells[i, c, channel]) * keys[c, channel]
        prints[i] = total
        placed = 0
        if i:  # those of the observation before, until one is missing here
            for k in range(obstacle.shape[1]):
                before, where = obstacle[i - 1, k], -1
                for s in range(placed, n_seen):
                    if seen[s] == before:
                        where = s
                if before < 0:
                    break
                if where >= 0:
                    seen[placed], seen[where] = seen[where], seen[placed]
                    placed += 1
        for k in range(n_seen):
            obstacle[i, k] = seen[k]
    return n_codes
