"""The one place that starts Prefect's API and Dask, and handles signals."""
