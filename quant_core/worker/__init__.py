"""How a stage of the pipeline runs in a process that can be killed.

Processes, locks, limits and /proc are known here and nowhere else in the core.
"""
