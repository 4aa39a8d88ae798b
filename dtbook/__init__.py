"""The helper package behind the Decision Transformer book: one module a room, data flowing one way."""
