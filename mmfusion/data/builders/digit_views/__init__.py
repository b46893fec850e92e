"""Handwritten digits with six feature sets."""
