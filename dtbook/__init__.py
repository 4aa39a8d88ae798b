"""The helper package behind the Decision Transformer book: a dozen rooms, each importing only from those above it."""
