"""Shards behind URLs: fetched, cached and read ahead."""
