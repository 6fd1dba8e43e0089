"""Adapters to other libraries, each of which is an extra."""
