"""Handwritten digits in six descriptions."""
