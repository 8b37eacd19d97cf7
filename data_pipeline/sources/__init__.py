"""Datasets as samples: official layouts and any folder or table."""
