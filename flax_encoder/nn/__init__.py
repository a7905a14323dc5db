"""Flax modules that hold parameters and nothing else; dropout takes a key, and no key means deterministic."""
