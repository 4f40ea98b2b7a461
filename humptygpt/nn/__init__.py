"""Layers that models are built from, the article's first network, and LoRA.

In: tensors. Out: tensors. It imports core alone.
"""
