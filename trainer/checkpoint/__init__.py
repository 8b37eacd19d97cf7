"""Checkpoints: how they are written, found, verified and read."""
