"""Options: the dataclasses of all commands, and the command lines, YAML files and --help that are made from them.

schema     sections of options, each a frozen dataclass       commands   the sections and the description of a command
options    flags and YAML → a dataclass of sections           parser     argparse, with errors and notes of our own
prompt     how a prompt words the persona
"""
