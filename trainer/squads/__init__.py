"""Models that leave a run: squads of tasks, whole models, files for other programs."""
