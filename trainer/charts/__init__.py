"""Pictures of a run: arrays in, PNG out."""
