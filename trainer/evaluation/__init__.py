"""Measuring a model: metrics, the best constant, gradient conflict, predictions for photos."""
