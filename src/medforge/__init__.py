"""MedForge: fine-tune, prove and serve medical vision-language models."""

__version__ = "0.1.0"
