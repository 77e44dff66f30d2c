"""Thin Prefect tasks: each hands one stage of the core to a Dask worker.

stages              the tasks, one for each stage
workers             where a stage runs, and what happens if its worker dies
rows, report        the rows of the reports as types, and their Parquet
locations           paths and URLs
stores, store_requests
                    files in stores, through fsspec
cache, contents     what URLs hold; local copies by digest
remote              a stage that runs on such copies
"""
