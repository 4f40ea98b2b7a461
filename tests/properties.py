"""Hypothesis; without it, its tests are skipped with the reason and all others run.

from properties import given, settings, st
"""

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:
    from unittest.mock import MagicMock

    import pytest

    st = MagicMock()  # strategies are built when a test file is imported

    def given(**strategies):
        return pytest.mark.skip(reason="needs hypothesis: pip install -r requirements-dev.txt")

    def settings(**options):
        return lambda test: test


__all__ = ["given", "settings", "st"]
