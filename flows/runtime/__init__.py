"""Prefect's API, Dask's workers and signals: the one place that starts and ends processes.

run_options         what the caller of a run decides
prefect_api, own_server, api_server
                    whose Prefect a run uses, and the server that it starts for itself
dask, tls           the workers of a run, and how they are talked to
signals, process, import_path
                    Ctrl-C and SIGTERM; what a process inherits and imports
javascript, openvino_ir
                    models timed by JavaScript runtimes; files of OpenVINO
"""
