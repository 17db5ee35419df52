"""Evaluation: perplexity, samples, reports."""
