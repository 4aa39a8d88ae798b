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


@compiled
@no_type_check
def add_up(bins, weights, often):
    """Add the weight of each row to that of its bin."""
    for i in range(len(bins)):
        often[bins[i]] += weights[i]


@compiled
@no_type_check
def find_in(bins, wanted, rows):
    """Write the rows whose bins are wanted; return how many there are."""
    n = 0
    for i in range(len(bins)):
        if wanted[bins[i]]:
            rows[n] = i
            n += 1
    return n


@partial(compiled, fastmath=True)
@no_type_check
def sum_runs(
    view,
    obstacle,
    of_view,
    of_obstacle,
    source,
    part,
    fixed,
    coefficient,
    step,
    group,
    run,
    floor,
    W,
    wanted,
    rows,
    out,
):
    """Write W @ max(run, floor) for each run and observation, (run, row of W, n).

    Everything is a sum of coefficients, numbers of each observation, times rows of columns. Rows are numbered: first
    the sum of each observation's rows of the tables, for each pair of `source` and `part`; then those that are `fixed`;
    then what steps make, each a sum of four coefficients times rows, in turn in the places that are left of `rows`. A
    run is a row that its group shares, and a coefficient times one more row. Groups are of one run or of four, which
    share what is loaded.

    Shapes: view (source, n), obstacle (source, n, most), of_view and of_obstacle (row, part, column), source and part
    (sum), fixed (any, column), coefficient (any, n), step (step, 4, 2: coefficient, row), group (group, 6: how many
    steps come before it, shared row, four runs or one and −1), run (run, 2: coefficient, row), floor (column), W (a
    multiple of three, column), wanted (run: how many rows of W are wanted of it, of a group those of its first), rows
    (sources · (most + 1) · parts + fixed + any, column: where this works).
    """
    n_sources, n, most = obstacle.shape
    n_parts, n_columns = of_view.shape[1:]
    n_sums = len(source)
    each = (most + 1) * n_parts  # rows of a source: partial sums, the last one of each part is its sum
    first_fixed = n_sources * each
    first_made = first_fixed + len(fixed)
    n_made = len(rows) - first_made
    rows[first_fixed:first_made] = fixed
    at = np.arange(n_sums + len(fixed) + n_made) + first_fixed - n_sums
    held = np.full((n_sources, most + 1), -1)  # which rows of the tables the partial sums hold
    used = np.zeros((n_sources, n_parts), np.bool_)
    for k in range(n_sums):
        used[source[k], part[k]] = True
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
                        k = s * each + p
                        for j in range(n_columns):
                            rows[k, j] = of_view[seen, p, j]
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
                        k = s * each + depth * n_parts + p
                        if two:
                            m = k + 2 * n_parts
                            for j in range(n_columns):
                                both = of_obstacle[row, p, j] + of_obstacle[another, p, j]
                                rows[m, j] = rows[k, j] + both
                        else:
                            m = k + n_parts
                            for j in range(n_columns):
                                rows[m, j] = rows[k, j] + of_obstacle[row, p, j]
                depth += 2 if two else 1
            if depth < most:
                held[s, depth + 1] = -1
            for k in range(n_sums):
                if source[k] == s:
                    at[k] = s * each + depth * n_parts + part[k]
        made = 0
        for g in range(len(group)):
            while made < group[g, 0]:
                a, b, c, d = (
                    at[step[made, 0, 1]],
                    at[step[made, 1, 1]],
                    at[step[made, 2, 1]],
                    at[step[made, 3, 1]],
                )
                x, y = coefficient[step[made, 0, 0], i], coefficient[step[made, 1, 0], i]
                z, w = coefficient[step[made, 2, 0], i], coefficient[step[made, 3, 0], i]
                k = first_made + made % n_made
                for j in range(n_columns):
                    rows[k, j] = x * rows[a, j] + y * rows[b, j] + z * rows[c, j] + w * rows[d, j]
                made += 1
            base, first, second, third, last = (
                at[group[g, 1]],
                group[g, 2],
                group[g, 3],
                group[g, 4],
                group[g, 5],
            )
            a, x = at[run[first, 1]], coefficient[run[first, 0], i]
            if second < 0:
                for k in range(0, wanted[first], 3):
                    x0, x1, x2 = zero, zero, zero
                    for j in range(n_columns):
                        post = max(rows[base, j] + x * rows[a, j], floor[j])
                        x0 += post * W[k, j]
                        x1 += post * W[k + 1, j]
                        x2 += post * W[k + 2, j]
                    out[first, k, i], out[first, k + 1, i], out[first, k + 2, i] = x0, x1, x2
            else:
                b, y = at[run[second, 1]], coefficient[run[second, 0], i]
                c, z = at[run[third, 1]], coefficient[run[third, 0], i]
                d, w = at[run[last, 1]], coefficient[run[last, 0], i]
                for k in range(0, wanted[first], 3):
                    x0, x1, x2, y0, y1, y2 = zero, zero, zero, zero, zero, zero
                    z0, z1, z2, w0, w1, w2 = zero, zero, zero, zero, zero, zero
                    for j in range(n_columns):
                        both = rows[base, j]
                        post = max(both + x * rows[a, j], floor[j])
                        x0 += post * W[k, j]
                        x1 += post * W[k + 1, j]
                        x2 += post * W[k + 2, j]
                        post = max(both + y * rows[b, j], floor[j])
                        y0 += post * W[k, j]
                        y1 += post * W[k + 1, j]
                        y2 += post * W[k + 2, j]
                        post = max(both + z * rows[c, j], floor[j])
                        z0 += post * W[k, j]
                        z1 += post * W[k + 1, j]
                        z2 += post * W[k + 2, j]
                        post = max(both + w * rows[d, j], floor[j])
                        w0 += post * W[k, j]
                        w1 += post * W[k + 1, j]
                        w2 += post * W[k + 2, j]
                    out[first, k, i], out[first, k + 1, i], out[first, k + 2, i] = x0, x1, x2
                    out[second, k, i], out[second, k + 1, i], out[second, k + 2, i] = y0, y1, y2
                    out[third, k, i], out[third, k + 1, i], out[third, k + 2, i] = z0, z1, z2
                    out[last, k, i], out[last, k + 1, i], out[last, k + 2, i] = w0, w1, w2
