"""Readers of public benchmarks in the layouts in which people have their files."""
