"""Evaluation: data with known truths, the paper's protocol and its metric."""
