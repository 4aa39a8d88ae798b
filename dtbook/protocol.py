"""What everything is decided by: the returns and timesteps that are asked for, and the bars."""

HIGH = 0.9
"""The return that the post calls high."""
RTGS = (-1.0, 0.0, HIGH)
"""The three returns that the post's Table 1 asks for."""
TIMESTEPS = (0, 5, 10, 20, 40)
"""The timesteps that P(F | situation, R) is averaged over."""

AVOIDS, DOES_NOT = 0.05, 0.2
"""P(F) up to which a situation is avoided, and from which on it is not; between: unclear."""
TABLE_1 = {
    -1.0: {"wall": True, "obstacle": False, "goal": True},
    0.0: {"wall": True, "obstacle": True, "goal": True},
    HIGH: {"wall": True, "obstacle": True, "goal": False},
}
"""The post's Table 1: what is avoided at which RTG."""
