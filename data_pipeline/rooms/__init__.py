"""The embedded dataset: furnished rooms, ray-cast on the CPU, with exact labels for all tasks."""
