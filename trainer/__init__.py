"""Training, evaluation, checkpoints, reports and the `modsquad` command."""
