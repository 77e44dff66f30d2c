"""What people see: tables and progress.

printing            answers and errors, as tables or JSON
model_views, result_views, timing_views, run_views, tables, formats
                    views of answers, and what they are made of
events, progress    what a run reports while it works, and how that is shown
result, artifacts   how a run ended, and in Prefect's UI
choice, flags       why a plan was chosen, in words; what options are called
"""
