"""Parsers of model files: bounded, by ranged reads, for a fenced process."""
