"""The embedded procedural dataset: furnished rooms with labels of all tasks."""
