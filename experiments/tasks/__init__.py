"""What is learned: one file per kind of task; see `experiments.tasks.task`."""
