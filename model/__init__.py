"""The vision transformer with expert layers: plain tensor code."""
