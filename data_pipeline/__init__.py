"""Shards, plan, loader, converters and the embedded dataset."""
