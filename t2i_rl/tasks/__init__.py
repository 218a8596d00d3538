"""What the one command can do: one module a task, each with `run(cfg)`."""
