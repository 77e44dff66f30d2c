"""The command `quantmill`."""
