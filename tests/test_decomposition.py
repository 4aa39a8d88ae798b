"""Observations as views and obstacles: the parts give every image back, whatever the room holds."""

import numpy as np
import pytest

from dtbook.gridworld import EMPTY, GOAL, OBSTACLE, all_observations
from dtbook.gridworld.decomposition import take_apart


def put_together(parts):
    """The images that parts are of, drawn without looking at how they were found."""
    images = parts.views[parts.view]
    for row, obstacles in enumerate(parts.obstacle):
        for column, line, colour, state in parts.obstacles[obstacles[obstacles >= 0]]:
            assert images[row, column, line].tolist() == [EMPTY, 0, 0]
            images[row, column, line] = OBSTACLE, colour, state
    return images


@pytest.fixture(scope="module")
def images():
    return all_observations(5, 2).images


def test_parts_give_every_image_back(images):
    parts = take_apart(images)
    np.testing.assert_array_equal(put_together(parts), images)
    assert len(np.unique(parts.views, axis=0)) == len(parts.views)
    assert len(np.unique(parts.obstacles, axis=0)) == len(parts.obstacles)
    some = np.array([7, 3, 3, 60])
    np.testing.assert_array_equal(put_together(parts[some]), images[some])


def test_the_population_is_86_views_and_41_obstacles():
    """Of the design's 86 obstacle-free views of 8×8; in 41 of the 49 cells of a view an obstacle can be seen."""
    parts = all_observations().parts
    assert (len(parts.views), len(parts.obstacles)) == (86, 41)
    assert parts.obstacle.shape[1] == 4


def test_the_views_are_those_of_the_empty_room():
    views = {view.tobytes() for view in all_observations(6, 3).parts.views}
    assert views == {view.tobytes() for view in all_observations(6, 0).images}


@pytest.mark.parametrize("what", ["colours", "goal", "full", "view", "no obstacle", "none"])
def test_other_rooms_are_taken_apart_too(images, what):
    rng, images = np.random.default_rng(1), images[:400].copy()
    if what == "colours":
        at = images[..., 0] == OBSTACLE
        images[at, 1:] = rng.integers(0, 256, (at.sum(), 2))
    elif what == "goal":  # anywhere, several too
        images[rng.random(images.shape[:3]) < 0.05] = GOAL, 1, 0
    elif what == "full":
        images[::7] = OBSTACLE, 2, 0
    elif what == "view":
        images = rng.integers(0, 11, (300, 5, 5, 3)).astype(np.uint8)
        images[images[..., 0] == EMPTY, 1:] = 0
    elif what == "no obstacle":
        images[images[..., 0] == OBSTACLE] = EMPTY, 0, 0
    else:
        images = images[:0]
    parts = take_apart(images)
    np.testing.assert_array_equal(put_together(parts), images)


def test_more_obstacles_than_two_bytes_count_are_told_apart():
    images = np.zeros((2000, 5, 5, 3), np.uint8)
    images[..., 0] = OBSTACLE
    images[..., 1:] = np.random.default_rng(5).integers(0, 256, (2000, 5, 5, 2))
    parts = take_apart(images)
    assert len(parts.obstacles) > 2**15
    np.testing.assert_array_equal(put_together(parts), images)


def test_neighbours_begin_with_the_same_obstacles(images):
    """Where one obstacle moves, the others come first: the sums of a listing add little more than a row each."""
    parts = all_observations(6, 3).parts
    alike = (parts.view[1:] == parts.view[:-1])[:, None] & (parts.obstacle[1:] == parts.obstacle[:-1])
    shared = (np.cumprod(alike, 1).astype(bool) & (parts.obstacle[1:] >= 0)).sum(1)
    assert ((parts.obstacle[1:] >= 0).sum(1) - shared).mean() < 1.5
