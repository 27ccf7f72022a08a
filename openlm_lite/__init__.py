"""Pretraining of decoder-only language models, from raw text to a Hugging Face folder."""

__version__ = "0.1.0"
