"""The command `quantmill`.

commands            the program, and the list of its commands
one_model, many_models, doctor
                    the commands; each docstring there is a command's help
command, errors     how a function becomes a command, and its answer or error is printed
answers, timings, export
                    what the commands about one model answer, as JSON values
next_commands       the command line that an answer suggests
parameters          arguments, and options of few commands
options, option, groups, checks
                    options that commands share, the value that each group of them builds, and
                    which of them mean nothing
module              `python -m quantmill`
"""
