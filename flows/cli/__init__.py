"""The command `quantmill`.

commands            the program, and the list of its commands
one_model, many_models, doctor
                    the commands; each docstring there is a command's help
command             how a function becomes a command, and what it answers is printed
answers, timings    what the commands about one model answer, as JSON values
parameters          arguments, and options of few commands
options, option, groups
                    options that commands share, and the value that each group of them builds
module              `python -m quantmill`
"""
