"""Ranks, process groups and launchers."""
