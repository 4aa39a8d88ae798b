"""The compiled inner loops of `population`: plain arrays in, plain arrays out, one thread, no checks.

An observation is a view and up to `most` obstacles (`gridworld.decomposition`); whatever is linear in it is a row of a
table of views plus rows of a table of obstacles. Neighbours begin with the same rows, so partial sums are kept on a
stack and only what differs is added. The order of the additions is always that of the parts.
"""

from functools import partial
from typing import no_type_check

import numpy as np

from dtbook.gridworld.kernels import compiled


@partial(compiled, fastmath=True)
@no_type_check
def sum_rows(view, obstacle, of_view, of_obstacle, out):
    """Write the sum of each observation's rows, (n, column), into `out`."""
    for i in range(len(view)):
        for j in range(of_view.shape[1]):
            out[i, j] = of_view[view[i], j]
        for k in range(obstacle.shape[1]):
            row = obstacle[i, k]
            if row < 0:
                break
            for j in range(of_view.shape[1]):
                out[i, j] += of_obstacle[row, j]


@compiled
@no_type_check
def sum_products(view, obstacle, view_view, view_obstacle, obstacle_obstacle, out):
    """Write, for each head, the sum over all pairs of an observation's parts, (head, n), into `out`.

    `view_obstacle` holds both orders of a pair, and so do the entries of `obstacle_obstacle` off its diagonal.
    """
    for h in range(len(out)):
        for i in range(len(view)):
            total = view_view[h, view[i]]
            for k in range(obstacle.shape[1]):
                row = obstacle[i, k]
                if row < 0:
                    break
                total += view_obstacle[h, view[i], row] + obstacle_obstacle[h, row, row]
                for m in range(k):
                    total += obstacle_obstacle[h, row, obstacle[i, m]]
            out[h, i] = total


@compiled
@no_type_check
def sum_numbers(view, obstacle, of_view, of_obstacle, out):
    """Add each observation's numbers, (head, n), to `out`."""
    for h in range(len(out)):
        for i in range(len(view)):
            total = of_view[view[i], h]
            for k in range(obstacle.shape[1]):
                row = obstacle[i, k]
                if row < 0:
                    break
                total += of_obstacle[row, h]
            out[h, i] += total


@compiled
@no_type_check
def add_weights(view, obstacle, weight, to_view, to_obstacle):
    """Add each observation's weight to those of its parts: how often a weighted sum holds each row."""
    for i in range(len(view)):
        to_view[view[i]] += weight[i]
        for k in range(obstacle.shape[1]):
            if obstacle[i, k] < 0:
                break
            to_obstacle[obstacle[i, k]] += weight[i]


@partial(compiled, fastmath=True)
@no_type_check
def sum_runs(
    view,
    obstacle,
    of_view,
    of_obstacle,
    source,
    part,
    weight,
    scale,
    vectors,
    vector,
    constant,
    choice,
    W,
    rows,
    out,
):
    """Write what runs give on the logits, (run, action, n): of their neurons, then after len(W) rows directly.

    A term is constant + weight · (the sum of the rows of one part of one source) + scale · vector, with a weight and a
    scale for every observation; where `part` is −1 it is its constant alone. What W_in and W_U read in a run is the sum
    of the terms that `choice` names: a column for each neuron, then one for each action.

    Shapes: view (source, n), obstacle (source, n, most), of_view and of_obstacle (row, part, column), source and part
    (term), weight and scale (term, n), vectors (any, column), whose rows `vector` and `constant` (term) are, choice
    (run, ≥ 3, filled up with a term of zero), W (actions filled up to a multiple of three, neuron), rows (run: how many
    of W are wanted of it).
    """
    n_sources, n, most = obstacle.shape
    n_parts, n_columns = of_view.shape[1:]
    n_terms, n_neurons, n_actions = len(part), W.shape[1], out.shape[1] - len(W)
    stack = np.zeros((n_sources, most + 1, n_parts, n_columns), of_view.dtype)
    held = np.full((n_sources, most + 1), -1)  # which rows the stack holds
    top = np.zeros(n_sources, np.int64)
    used = np.zeros((n_sources, n_parts), np.bool_)
    terms = np.zeros((n_terms + len(choice), n_columns), of_view.dtype)
    for t in range(n_terms):
        terms[t] = vectors[constant[t]]
        if part[t] >= 0:
            used[source[t], part[t]] = True
    zero = of_view.dtype.type(0)
    for i in range(n):
        for s in range(n_sources):
            depth, seen = 0, view[s, i]
            if held[s, 0] == seen:  # what the observation before begins with as well
                while (
                    depth < most
                    and obstacle[s, i, depth] >= 0
                    and obstacle[s, i, depth] == held[s, depth + 1]
                ):
                    depth += 1
            else:
                held[s, 0] = seen
                for p in range(n_parts):
                    if used[s, p]:
                        for j in range(n_columns):
                            stack[s, 0, p, j] = of_view[seen, p, j]
            shared = 0  # how far the next observation begins alike: partial sums beyond that are of no use
            if i + 1 < n and view[s, i + 1] == seen:
                while shared < most and obstacle[s, i, shared] == obstacle[s, i + 1, shared]:
                    shared += 1
            while depth < most and obstacle[s, i, depth] >= 0:
                row = obstacle[s, i, depth]
                held[s, depth + 1] = row
                two = depth >= shared and depth + 1 < most and obstacle[s, i, depth + 1] >= 0
                if two:
                    another = obstacle[s, i, depth + 1]
                    held[s, depth + 1], held[s, depth + 2] = -1, another
                    for p in range(n_parts):
                        if used[s, p]:
                            for j in range(n_columns):
                                both = of_obstacle[row, p, j] + of_obstacle[another, p, j]
                                stack[s, depth + 2, p, j] = stack[s, depth, p, j] + both
                    depth += 2
                else:
                    for p in range(n_parts):
                        if used[s, p]:
                            for j in range(n_columns):
                                stack[s, depth + 1, p, j] = stack[s, depth, p, j] + of_obstacle[row, p, j]
                    depth += 1
            if depth < most:
                held[s, depth + 1] = -1
            top[s] = depth
        for t in range(n_terms):
            if part[t] >= 0:
                w, b, s, p = weight[t, i], scale[t, i], source[t], part[t]
                c, d, depth = constant[t], vector[t], top[s]
                for j in range(n_columns):
                    terms[t, j] = vectors[c, j] + w * stack[s, depth, p, j] + b * vectors[d, j]
        for c in range(3, choice.shape[1]):
            for r in range(len(choice)):  # more than three: the third place is their sum
                for j in range(n_columns):
                    first = terms[choice[r, 2], j] if c == 3 else terms[n_terms + r, j]
                    terms[n_terms + r, j] = first + terms[choice[r, c], j]
        for r in range(0, len(choice), 2):  # two at a time, as they share what is loaded of W
            q = min(r + 1, len(choice) - 1)
            first, second, third = choice[r, 0], choice[r, 1], choice[r, 2]
            other, another, last = choice[q, 0], choice[q, 1], choice[q, 2]
            if choice.shape[1] > 3:
                third, last = n_terms + r, n_terms + q
            for a in range(0, rows[r], 3):
                x, y, z, u, v, w = zero, zero, zero, zero, zero, zero
                if q > r:
                    for j in range(n_neurons):
                        also = max(terms[other, j] + terms[another, j] + terms[last, j], zero)
                        post = max(terms[first, j] + terms[second, j] + terms[third, j], zero)
                        u += also * W[a, j]
                        v += also * W[a + 1, j]
                        w += also * W[a + 2, j]
                        x += post * W[a, j]
                        y += post * W[a + 1, j]
                        z += post * W[a + 2, j]
                    out[q, a, i], out[q, a + 1, i], out[q, a + 2, i] = u, v, w
                else:
                    for j in range(n_neurons):
                        post = max(terms[first, j] + terms[second, j] + terms[third, j], zero)
                        x += post * W[a, j]
                        y += post * W[a + 1, j]
                        z += post * W[a + 2, j]
                out[r, a, i], out[r, a + 1, i], out[r, a + 2, i] = x, y, z
            for a in range(n_actions):
                j = n_neurons + a
                out[q, len(W) + a, i] = terms[other, j] + terms[another, j] + terms[last, j]
                out[r, len(W) + a, i] = terms[first, j] + terms[second, j] + terms[third, j]
