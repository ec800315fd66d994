"""Causal language models and the language models of vision-language models, through the same core as images."""
