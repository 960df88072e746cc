"""`pf bench`: the twins and their peers, timed head to head on the same numbers (docs/benchmark.md).

`case` says what is compared, the suites build the cases, `agree` refuses what computes something else, `timing` takes
turns and repeats what was disturbed, `worker` does all that in a fresh process, `run` starts the processes and writes
JSON, Markdown and plots, and `check` holds ratios against the committed ones.
"""
