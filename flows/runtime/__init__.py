"""Prefect's API, Dask's workers and signals: the one place that starts and ends processes."""
