"""The generated `stand_ins` datasets."""
