"""Leaves: pictures and measurements."""
