"""Doors and runs: the manifest, the runtime, the batch and the command line."""
