"""`modsquad tune`: the fastest layout and DeepSpeed settings, by short real trials."""
