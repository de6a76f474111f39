"""Proof that what was exported says what was trained: token ids, distributions, greedy tokens, perplexity."""
