"""The rules of the claims once more, naively, from their words alone: hooks on the model, float64, few observations.

Nothing of `dtbook.claims` or `dtbook.analysis` is used, so that what those do can be held against this. A rule
takes a model of one timestep, in float64, whose head 1 is the obstacle head, and a `Sample`; rules about play take
tables. It returns the numbers that its words compare, and whether they pass. A rule that the second edition replaced
stands here in both words: those of C23 are `c23_token`, those of "C23 first edition" `c23`.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch

LEFT, RIGHT, FORWARD = 0, 1, 2
OBJECT, COLOUR, STATE = 26, 75, 124  # the rows of W_E_state that read the cell in front, image[3, 5]
CONTENT = {"empty": (1, 0, 0), "wall": (2, 5, 0), "obstacle": (6, 2, 0), "goal": (8, 1, 0)}
FACING_EAST, FACING_SOUTH = 0, 1
LEFT_OF_THE_GOAL, ABOVE_THE_GOAL = 5 + 8 * 6, 6 + 8 * 5  # cells x + 8·y; the goal is at (6, 6)
HIGH, STEP, STEPS = 0.9, 10, (0, 5, 10, 20, 40)
Z, MLP_OUT, PATTERN, V = (
    "blocks.0.attn.hook_z",
    "blocks.0.hook_mlp_out",
    "blocks.0.attn.hook_pattern",
    "blocks.0.attn.hook_v",
)
STATE_EMBED, RESID_PRE = "hook_state_embed", "blocks.0.hook_resid_pre"
READ = [Z, MLP_OUT, PATTERN, V, STATE_EMBED, RESID_PRE]


class Decision(NamedTuple):
    """The numbers that a rule's words compare with its bars, and whether all pass."""

    numbers: tuple[float, ...]
    passes: bool


class Sample(NamedTuple):
    """Observations (n, 7, 7, 3), how many states show each, and a pose that does: cell and direction, (n,) each."""

    images: np.ndarray
    count: np.ndarray
    cell: np.ndarray
    direction: np.ndarray


def draw(observations, rng, obstacles=600, n=2000):
    """Return rows of all observations: those with a wall or the goal in front, some with an obstacle, else empty."""
    front = observations.images[:, 3, 5, 0]
    few = np.flatnonzero(np.isin(front, (2, 8)))
    blocked = rng.choice(np.flatnonzero(front == 6), obstacles, replace=False)
    free = rng.choice(np.flatnonzero(front == 1), n - obstacles - len(few), replace=False)
    return np.sort(np.concatenate([few, blocked, free]))


def shows(sample, situation):
    """Return which observations show a situation, by the cell in front or by the agent's pose: (n,)."""
    if situation == "goal from the top":
        return (sample.cell == ABOVE_THE_GOAL) & (sample.direction == FACING_SOUTH)
    if situation == "goal from the left":
        return (sample.cell == LEFT_OF_THE_GOAL) & (sample.direction == FACING_EAST)
    return sample.images[:, 3, 5, 0] == CONTENT[situation][0]


def seen(sample, situation):
    """Return the images that show a situation, and their weights, which sum to 1."""
    rows = shows(sample, situation)
    return sample.images[rows], sample.count[rows] / sample.count[rows].sum()


# Running the model.


def inputs(images, rtg, step):
    n = len(images)
    rtgs = torch.full((n, 1), rtg, dtype=torch.float64)
    return torch.from_numpy(images)[:, None], rtgs, torch.full((n, 1), step)


def run(model, images, rtg, step, hooks=()):
    """Return the logits (n, 3) at the state token."""
    with torch.no_grad():
        return model.run_with_hooks(*inputs(images, rtg, step), fwd_hooks=list(hooks))[:, 0].numpy()


def cached(model, images, rtg, step, hooks=()):
    """Return the activations of a run that rules read, by TransformerLens's names."""
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model.run_with_cache(*inputs(images, rtg, step), names_filter=READ)[1]


def zero_head(head):
    """Return the hook that ablates a head: its z at the state token is 0."""

    def hook(z, hook):
        z = z.clone()
        z[:, 1, head] = 0
        return z

    return [(Z, hook)]


def zero_mlp():
    """Return the hook that ablates the MLP: what it writes at the state token is 0."""

    def hook(out, hook):
        out = out.clone()
        out[:, 1] = 0
        return out

    return [(MLP_OUT, hook)]


def put(name, where, donor):
    """Return the hook that puts in an activation, at some of its indices, what it is in a donor's cache."""

    def hook(activation, hook):
        activation = activation.clone()
        activation[where] = donor[name][where]
        return activation

    return (name, hook)


def emptied(images):
    """Return the counterfactual: the cell in front, and no other, is empty."""
    images = images.copy()
    images[:, 3, 5] = CONTENT["empty"]
    return images


# Numbers that several rules read.


def direction(model, plus, minus):
    """Return the difference of two actions' columns of W_U: F−R, R−L (d_model)."""
    return (model.W_U[:, plus] - model.W_U[:, minus]).detach().numpy()


def probability(model, sample, situation, rtg, action=FORWARD, hooks=()):
    """Return P(action | situation, R): the weighted mean over the observations, averaged over the timesteps."""
    images, weight = seen(sample, situation)
    by_step = []
    for step in STEPS:
        logits = run(model, images, rtg, step, hooks)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        by_step.append(weight @ (odds[:, action] / odds.sum(1)))
    return float(np.mean(by_step))


def rise(model, sample, situation, rtg, hooks):
    """Return P(F) ablated − P(F) intact."""
    return probability(model, sample, situation, rtg, hooks=hooks) - probability(
        model, sample, situation, rtg
    )


def drive(logits):
    """Return logit F − logsumexp(logit L, logit R): (n,)."""
    return logits[:, FORWARD] - np.logaddexp(logits[:, LEFT], logits[:, RIGHT])


def patched(model, sample, *places):
    """Return the weighted mean change of `drive` when places are patched from the counterfactual run, and the whole."""
    images, weight = seen(sample, "obstacle")
    donor = cached(model, emptied(images), HIGH, STEP)
    clean = drive(run(model, images, HIGH, STEP))
    changed = drive(run(model, images, HIGH, STEP, [put(name, where, donor) for name, where in places]))
    whole = drive(run(model, emptied(images), HIGH, STEP)) - clean
    return float(weight @ (changed - clean)), float(weight @ whole)


def obstacle_score(model, sample, head):
    """Return which share of the counterfactual's change one head's output carries."""
    part, whole = patched(model, sample, (Z, np.s_[:, 1, head]))
    return part / whole


def has_obstacle_head(model, sample):
    """Return whether head 1 is the obstacle head: the larger score, of at least 0.25."""
    zero, one = (obstacle_score(model, sample, head) for head in (0, 1))
    return one >= 0.25 and one > zero


def state_rows(model):
    return model.W_E_state.detach().numpy()


def front_cell(model, content):
    """Return what the front cell adds to the state token when it holds something (d_model)."""
    return np.array(CONTENT[content]) @ state_rows(model)[[OBJECT, COLOUR, STATE]]


def through_ov(model, vector):
    """Return what head 1 writes of a token that it attends to fully (d_model), biases apart."""
    attn = model.blocks[0].attn
    return vector @ attn.W_V[1].detach().numpy() @ attn.W_O[1].detach().numpy()


def attention_to_rtg(model, sample, situation):
    """Return head 1's weighted mean attention from the state token to RTG, at R = 0.9, averaged over the timesteps."""
    images, weight = seen(sample, situation)
    patterns = [cached(model, images, HIGH, step)[PATTERN][:, 1, 1, 0].numpy() for step in STEPS]
    return float(np.mean([weight @ pattern for pattern in patterns]))


# Data and behaviour: tables in place of a model.


def c01(returns, lengths):
    """Each class, −1, 0 and positive, ≥ 5 % of the episodes; every zero-return episode is 300 long."""
    shares = tuple(float(np.mean(np.sign(returns) == sign)) for sign in (-1, 0, 1))
    return Decision(shares, min(shares) >= 0.05 and all(lengths[returns == 0] == 300))


def at(table, acting, rtg, column):
    """Return what a table of calibration curves says at one RTG, for "greedy" or "sampled" actions."""
    rows = table[(table["acting"] == acting) & ((table["rtg"] - rtg).abs() < 1e-6)]
    return float(rows[column].iloc[0])


def c02(table):
    """Mean return ≤ −0.9 at RTG −1, within ±0.15 at 0, ≥ 0.8 at 0.9; greedy and sampled."""
    means = [[at(table, acting, rtg, "mean") for rtg in (-1, 0, 0.9)] for acting in ("greedy", "sampled")]
    passes = [low <= -0.9 and abs(zero) <= 0.15 and high >= 0.8 for low, zero, high in means]
    return Decision(tuple(np.ravel(means).tolist()), all(passes))


def c03(table):
    """Share of episodes truncated at RTG 0 ≥ 0.8, greedy and sampled."""
    shares = tuple(at(table, acting, 0, "survived") for acting in ("greedy", "sampled"))
    return Decision(shares, min(shares) >= 0.8)


def c04(table):
    """First edition. Mean |achieved − asked| over RTG 0.1 … 0.8 ≥ 0.1, greedy."""
    distance = np.mean([abs(at(table, "greedy", rtg, "mean") - rtg) for rtg in np.arange(1, 9) / 10])
    return Decision((float(distance),), distance >= 0.1)


def c04_plateaus(table):
    """A monotone three-plateau fit explains ≥ 0.9 of the greedy curve's variance, and ≥ 0.15 more than a line."""
    curve = table[table["acting"] == "greedy"].sort_values("rtg")
    x, y = curve["rtg"].to_numpy(), curve["mean"].to_numpy()
    line = np.sum((y - np.polyval(np.polyfit(x, y, 1), x)) ** 2)
    cuts = [np.split(y, [i, j]) for i in range(1, len(y) - 1) for j in range(i + 1, len(y))]
    rising = [parts for parts in cuts if parts[0].mean() <= parts[1].mean() <= parts[2].mean()]
    plateaus = min(
        (sum(len(part) * part.var() for part in parts) for parts in rising), default=len(y) * y.var()
    )
    explained = 1 - plateaus / (len(y) * y.var())
    more = (line - plateaus) / (len(y) * y.var())
    return Decision((float(explained), float(more)), explained >= 0.9 and more >= 0.15)


# Behaviour of the model itself.

CELLS = [(rtg, what) for rtg in (-1.0, 0.0, HIGH) for what in ("wall", "obstacle", "goal")]
AVOIDED = dict(zip("abcdefghi", (True, False, True, True, True, True, True, True, False), strict=True))


def c05(model, sample, letter, does_not=1 / 3):
    """Table 1 at −1 / 0 / 0.90: *avoids* is P(F) ≤ 0.05, *does not* P(F) ≥ 1/3 (first edition: 0.2)."""
    rtg, what = CELLS["abcdefghi".index(letter)]
    forward = probability(model, sample, what, rtg)
    return Decision((forward,), forward <= 0.05 if AVOIDED[letter] else forward >= does_not)


def c06(model, sample):
    """Left and right logits: Pearson r ≥ 0.8 over O, pooled over the three RTGs."""
    logits = np.concatenate([run(model, sample.images, rtg, STEP) for rtg in (-1.0, 0.0, HIGH)])
    weight = np.tile(sample.count / sample.count.sum(), 3) / 3
    left, right = (logits[:, action] - weight @ logits[:, action] for action in (LEFT, RIGHT))
    r = weight @ (left * right) / np.sqrt((weight @ left**2) * (weight @ right**2))
    return Decision((float(r),), r >= 0.8)


# Where it lives.


def c07(model, sample):
    """The state embedding's contribution to F−R: wall ≤ empty − 1, and goal ≥ empty + 0.5."""
    mean = {}
    for what in ("empty", "wall", "goal"):
        images, weight = seen(sample, what)
        embed = cached(model, images, HIGH, STEP)[STATE_EMBED][:, 0].numpy()
        mean[what] = weight @ embed @ direction(model, FORWARD, RIGHT)
    wall, goal = mean["wall"] - mean["empty"], mean["goal"] - mean["empty"]
    return Decision((wall, goal), wall <= -1 and goal >= 0.5)


def c08(model, sample):
    """Without head 0 it enters the goal from the top at −1: rise ≥ 0.3."""
    number = rise(model, sample, "goal from the top", -1.0, zero_head(0))
    return Decision((number,), number >= 0.3)


def c09(model, sample):
    """Without head 1 it hits obstacles at 0.9: rise ≥ 0.3."""
    number = rise(model, sample, "obstacle", HIGH, zero_head(1))
    return Decision((number,), number >= 0.3)


def c10(model, sample):
    """Without the MLP it enters the goal from the left at −1: rise ≥ 0.3."""
    number = rise(model, sample, "goal from the left", -1.0, zero_mlp())
    return Decision((number,), number >= 0.3)


def c11(model, sample):
    """Head 0 does not guard the goal from the left (at −1): rise < 0.1."""
    number = rise(model, sample, "goal from the left", -1.0, zero_head(0))
    return Decision((number,), number < 0.1)


def c12(model, sample):
    """Obstacle in front at 0.9: without head 1 the MLP's contribution to F−R rises, on ≥ 80 % of the weight."""
    images, weight = seen(sample, "obstacle")
    shares = []
    for step in STEPS:
        intact, without = (cached(model, images, HIGH, step, hooks)[MLP_OUT] for hooks in ([], zero_head(1)))
        change = (without - intact)[:, 1].numpy() @ direction(model, FORWARD, RIGHT)
        shares.append(weight @ (change > 0))
    return Decision((float(np.mean(shares)),), np.mean(shares) >= 0.8)


def c13(model, sample):
    """Without head 1, goal from the top at −1, and without head 0, obstacle at 0.9: rise < 0.1 each."""
    first = rise(model, sample, "goal from the top", -1.0, zero_head(1))
    second = rise(model, sample, "obstacle", HIGH, zero_head(0))
    return Decision((first, second), first < 0.1 and second < 0.1)


def log_odds(model, sample, situation, rtg, hooks=()):
    """Return ln(P(F) ÷ (1 − P(F)))."""
    forward = probability(model, sample, situation, rtg, hooks=hooks)
    return np.log(forward / (1 - forward))


def log_odds_moved(model, sample, situation, rtg, hooks):
    """Return the change of the log odds of forward ÷ what returns them to 0; NaN where nothing speaks against it."""
    intact = log_odds(model, sample, situation, rtg)
    if intact >= 0:
        return np.nan
    return (log_odds(model, sample, situation, rtg, hooks) - intact) / -intact


def c08_odds(model, sample):
    """C08's log odds: change ≥ half of what returns them to 0."""
    share = log_odds_moved(model, sample, "goal from the top", -1.0, zero_head(0))
    return Decision((share,), share >= 0.5)


def c09_odds(model, sample):
    """C09's log odds: change ≥ half of what returns them to 0."""
    share = log_odds_moved(model, sample, "obstacle", HIGH, zero_head(1))
    return Decision((share,), share >= 0.5)


def c10_odds(model, sample):
    """C10's log odds: change ≥ half of what returns them to 0."""
    share = log_odds_moved(model, sample, "goal from the left", -1.0, zero_mlp())
    return Decision((share,), share >= 0.5)


def c11_odds(model, sample):
    """C11's log odds: change < half of what returns them to 0."""
    share = log_odds_moved(model, sample, "goal from the left", -1.0, zero_head(0))
    return Decision((share,), share < 0.5)


def c13_odds(model, sample):
    """C13's log odds: both changes < half of what returns them to 0; one that has nothing to return is left out."""
    first = log_odds_moved(model, sample, "goal from the top", -1.0, zero_head(1))
    second = log_odds_moved(model, sample, "obstacle", HIGH, zero_head(0))
    return Decision((first, second), np.fmax(first, second) < 0.5)


# Embeddings.


def learnt(model, start):
    """Cosine of W_E_rtg to its start (d_model,) ≤ 0.9; else C14, C15, C20 and C23 are undecided."""
    now, then = (vector.detach().double().numpy() for vector in (model.W_E_rtg, start))
    cosine = now @ then / np.linalg.norm(now) / np.linalg.norm(then)
    return Decision((float(cosine),), cosine <= 0.9)


def rtg_on(model, plus, minus):
    return float(model.W_E_rtg.detach().numpy() @ direction(model, plus, minus))


def c14(model, sample):
    """RTG embedding · (F−R) ≥ 0.5."""
    number = rtg_on(model, FORWARD, RIGHT)
    return Decision((number,), number >= 0.5)


def c15(model, sample):
    """First edition. RTG embedding · (R−L): absolute value < 0.3 × that of C14."""
    ratio = abs(rtg_on(model, RIGHT, LEFT)) / abs(rtg_on(model, FORWARD, RIGHT))
    return Decision((ratio,), ratio < 0.3)


def c15_difference(model, sample):
    """|R−L| ≤ 0.3 × max(|F−R|, 0.1)."""
    number = abs(rtg_on(model, RIGHT, LEFT)) - 0.3 * max(abs(rtg_on(model, FORWARD, RIGHT)), 0.1)
    return Decision((number,), number <= 0)


def c16(model, sample, last=299):
    """The time embedding's F−R over t = 0 … 299 (first edition: 0 … 50): slope, its 95 % interval above 0."""
    t = np.arange(last + 1)
    y = model.W_E_time.detach().numpy()[t] @ direction(model, FORWARD, RIGHT)
    centred = t - t.mean()
    slope = centred @ y / (centred @ centred)
    residual = y - y.mean() - slope * centred
    error = np.sqrt(residual @ residual / (len(t) - 2) / (centred @ centred))
    return Decision((float(slope),), slope - STUDENT_95[len(t) - 2] * error > 0)


STUDENT_95 = {49: 2.0096, 298: 1.9680}
"""The 97.5 % point of Student's t by degrees of freedom, from a printed table."""


def c17(model, sample):
    """Front cell on F−R: wall ≤ −1; goal ≥ empty + 0.5; obstacle within 0.5 of empty."""
    empty, wall, obstacle, goal = (
        front_cell(model, what) @ direction(model, FORWARD, RIGHT) for what in CONTENT
    )
    passes = wall <= -1 and goal >= empty + 0.5 and abs(obstacle - empty) <= 0.5
    return Decision((wall, goal - empty, obstacle - empty), passes)


def c18(model, sample):
    """The front cell's colour weight is negative and its |z| among the 49 cells ≥ 3; its object weight is positive."""
    weights = state_rows(model) @ direction(model, FORWARD, RIGHT)
    colours = weights[49:98]
    z = (weights[COLOUR] - colours.mean()) / colours.std(ddof=1)
    passes = weights[COLOUR] < 0 and abs(z) >= 3 and weights[OBJECT] > 0
    return Decision((weights[COLOUR], z, weights[OBJECT]), passes)


def c19(model, sample):
    """The state channel's largest absolute weight < 1e-6."""
    largest = float(np.abs(state_rows(model)[98:147]).max())
    return Decision((largest,), largest < 1e-6)


# The head-1 circuit.


def c20(model, sample):
    """QK: object and colour in front inhibit attention to RTG: both negative."""
    attn = model.blocks[0].attn
    queries = state_rows(model)[[OBJECT, COLOUR]] @ attn.W_Q[1].detach().numpy()
    key = model.W_E_rtg.detach().numpy() @ attn.W_K[1].detach().numpy()
    scores = queries @ key
    return Decision(tuple(scores), scores.max() < 0)


def c21(model, sample, what):
    """Head 1's attention to RTG (R = 0.9): with empty − with obstacle / wall / goal in front ≥ 0.1."""
    fall = attention_to_rtg(model, sample, "empty") - attention_to_rtg(model, sample, what)
    return Decision((fall,), fall >= 0.1)


def c22(model, sample):
    """Front cell through OV on forward: obstacle and goal each ≤ empty − 1."""
    forward = model.W_U[:, FORWARD].detach().numpy()
    empty, obstacle, goal = (
        through_ov(model, front_cell(model, what)) @ forward for what in ("empty", "obstacle", "goal")
    )
    return Decision((obstacle - empty, goal - empty), obstacle <= empty - 1 and goal <= empty - 1)


def c23(model, sample):
    """First edition. The RTG embedding through head 1's OV at R = 0.9 contributes > 0 to F−R."""
    vector = HIGH * model.W_E_rtg.detach().numpy()
    number = float(through_ov(model, vector) @ direction(model, FORWARD, RIGHT))
    return Decision((number,), number > 0)


def c23_token(model, sample):
    """The RTG token (embedding, time, position) through head 1's OV at R = 0.9 contributes > 0 to F−R.

    It is averaged over the timesteps: on the post's weights this is the +6.0 that the words name.
    """
    tokens = [cached(model, sample.images[:1], HIGH, step)[RESID_PRE][0, 0].numpy() for step in STEPS]
    number = float(through_ov(model, np.mean(tokens, axis=0)) @ direction(model, FORWARD, RIGHT))
    return Decision((number,), number > 0)


def c24(model, sample):
    """Of the counterfactual's change through head 1: OV part (patch the values) ≥ QK part (patch the pattern)."""
    places = ((PATTERN, np.s_[:, 1, 1]), (V, np.s_[:, :, 1]), (Z, np.s_[:, 1, 1]))
    qk, ov, head = (patched(model, sample, place)[0] for place in places)
    return Decision((ov, qk, head), ov >= qk)


# Claims added.


def m1(model, sample):
    """One gate: sign(C21a) = sign(C23, embedding part)."""
    fall, written = c21(model, sample, "obstacle").numbers[0], c23(model, sample).numbers[0]
    return Decision((fall, written), np.sign(fall) == np.sign(written))


def m2(model, sample):
    """Share of the change with head 1's change and the MLP's own view of the cell ≥ 0.8, with either alone ≤ 0.5."""
    images, weight = seen(sample, "obstacle")
    base, donor = (cached(model, seen, HIGH, STEP) for seen in (images, emptied(images)))
    cell = donor[STATE_EMBED][:, 0] - base[STATE_EMBED][:, 0]

    def view(resid, hook):
        return resid + torch.stack([torch.zeros_like(cell), cell], dim=1)

    head, own = put(Z, np.s_[:, 1, 1], donor), ("blocks.0.hook_mlp_in", view)
    clean = drive(run(model, images, HIGH, STEP))
    whole = weight @ (drive(run(model, emptied(images), HIGH, STEP)) - clean)
    first, second, both = (
        float(weight @ (drive(run(model, images, HIGH, STEP, hooks)) - clean) / whole)
        for hooks in ([head], [own], [head, own])
    )
    return Decision((first, second, both), both >= 0.8 and first <= 0.5 and second <= 0.5)


def m3(model, sample, rtg=HIGH):
    """With nothing to avoid: |P(R) − P(L)| ÷ (P(R) + P(L)) ≥ 0.1; the sign says which."""
    right, left = (probability(model, sample, "empty", rtg, action) for action in (RIGHT, LEFT))
    bias = (right - left) / (right + left)
    return Decision((bias,), abs(bias) >= 0.1)


def m4(model, sample):
    """C09, C12, C20, C21a, C22 and C24 all hold in one model; without an obstacle head none does."""
    rules = (c09, c12, c20, partial(c21, what="obstacle"), c22, c24)
    holding = sum(rule(model, sample).passes for rule in rules) if has_obstacle_head(model, sample) else 0
    return Decision((float(holding),), holding == 6)
