"""LLMasOS: an operating system for large language models."""
