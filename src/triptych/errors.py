"""Mistakes of a user, each told in one sentence; importable without torch."""

from __future__ import annotations


class TriptychError(Exception):
    """A mistake that one sentence explains; shown without a traceback."""


class DataError(TriptychError):
    """A sample, file or folder that cannot be used; the sentence names it and the fix."""


class ConfigError(TriptychError):
    """A configuration that cannot be composed or asks for what does not exist."""
