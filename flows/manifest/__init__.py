"""The manifest: its schema, and the jobs that it requests.

read                from a file to jobs, with all mistakes at once; the files below are its steps
parse, schema, mistakes
                    the text, read safely; which keys and values it may have; what is wrong
paths, models, files
                    which files are meant; which models; what only the disk knows
make, jobs, outputs
                    from values to jobs; whose output a file is
custom_metrics      metrics that are code of the user's own
huggingface, draft  manifests of a Hugging Face folder, and of any other (`quantmill init`)
"""
