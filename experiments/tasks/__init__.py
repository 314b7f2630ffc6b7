"""Tasks: one file per kind; see `experiments.tasks.task`."""
