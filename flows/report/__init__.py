"""The reports of a batch as one HTML page.

page                the page: verdict, models, details
reported_model      a model as the page shows it
models_table, details, charts
                    the parts of the page
document, elements  HTML of any page
command_pages       the pages of `quantmill explain` and `quantmill compare`
"""
