"""Errors, settings and the command line, files, locks, memory and devices: what every room needs.

In: argv, config files, paths. Out: frozen dataclasses with every key checked, files written whole. It imports no
other room, and no torch but in device.py.
"""
