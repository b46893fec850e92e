"""Leaves: images and measurements."""
