"""Making it all: the table of stages, the engine, and the graphs of `reproduce`, `sweep` and `measure`."""

from dtbook.pipeline.replication import Recipe, calibrate, load_snapshots, name_of, replicate

__all__ = ["Recipe", "calibrate", "load_snapshots", "name_of", "replicate"]
