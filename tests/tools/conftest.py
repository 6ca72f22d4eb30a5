"""Fixtures of the data tests, for the tools that read data."""

from tests.data.conftest import cfg, mixed, tokenizer, tokenizer_config

__all__ = ["cfg", "mixed", "tokenizer", "tokenizer_config"]
