"""Folders that other libraries publish: weights, models, sentence-transformers settings."""
