"""Faster ways to compute the same numbers: a fused kernel of attention, other layers, a compiled step."""
