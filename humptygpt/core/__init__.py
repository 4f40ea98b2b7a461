"""Errors, settings and the command line, files, locks and memory: what every room needs.

In: argv, config files, paths. Out: frozen dataclasses with every key checked, files written whole. It imports no
other room, and no torch.
"""
