"""Thin Prefect tasks: each hands one stage of the core to a Dask worker."""
