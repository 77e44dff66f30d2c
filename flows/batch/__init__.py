"""A batch: every model of a manifest made, judged, timed and reported.

run                 `run_batch` and `plan_batch`, which the commands call
flow, flow_run      the same as a Prefect flow; what all flows do alike
batch               the life of a run, described at the top of the file
model_run, failure  one model on its way through its stages
to_do, digests, up_to_date
                    what has to be made, by the digests of what it is made of
record, rows, run_summary, rebuild
                    what is written down: entries, rows of the reports, summary.json
publish, copies     how finished files appear beside the output
"""
