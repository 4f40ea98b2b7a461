"""Faster generation: other layers that compute the same numbers, and a compiled step."""
