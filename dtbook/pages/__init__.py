"""The pages: the notebook runner, and the book on paper."""
