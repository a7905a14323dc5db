"""Tokenized documents on disk: written once, read by memory map."""
