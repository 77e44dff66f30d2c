"""An audit: what a batch has made is judged and timed again.

run, flow           `run_audit`, which the command calls; the same as a Prefect flow
audit               what becomes of each model
published           the models that a batch has made
"""
