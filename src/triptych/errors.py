"""Errors that one sentence explains; apart from everything else, so that importing them is free."""

from __future__ import annotations


class ConfigError(Exception):
    """A configuration that cannot run; the command line shows its sentence and exits with 2."""
