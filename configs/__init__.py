"""Typed configuration, the task table and the recipes; imports nothing else of the project."""
