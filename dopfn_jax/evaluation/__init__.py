"""Evaluation: data with known truths, the methods to compare, their scores, tables and figures."""
