"""What becomes of each node, and why: decided before anything is measured or rewritten."""
