"""Tokenizers: trained here or read from a folder, and word vectors."""
