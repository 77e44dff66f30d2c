"""Which of several plans is best: a bounded loop over plan, rewrite and evaluate."""
