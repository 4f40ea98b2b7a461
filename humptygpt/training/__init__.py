"""A run: its settings, its processes, its steps, its evaluations and its folder."""
