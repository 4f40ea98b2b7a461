"""A run to what its page computes with.

In: a run. Out: one HTML page. It imports interchange and what is below it.
"""
