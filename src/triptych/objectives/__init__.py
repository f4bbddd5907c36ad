"""Objectives: what a model is trained for, as named sums; no weights and no logging here."""
