"""Faster ways to compute the same numbers: a fused kernel of attention and other layers."""
