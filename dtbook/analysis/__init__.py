"""Looking inside: what a model does on every observation, and which of its parts do it."""
