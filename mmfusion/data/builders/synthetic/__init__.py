"""The generated `synthetic` dataset."""
