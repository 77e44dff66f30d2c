"""How a stage of the pipeline runs in a process that can be killed."""
