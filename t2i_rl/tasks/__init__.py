"""What the one command can do: one module a task.

`run(cfg)` does it and returns what results.json holds, where there is one. `check(cfg)`, where a task has it, refuses
in one line what it cannot do; the command line calls it first, and so does whoever calls `run` from Python.
"""
