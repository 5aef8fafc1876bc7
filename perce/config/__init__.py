"""Options: the dataclasses of all commands, and the command lines, YAML files and --help made of them.

schema     sections of options, each a frozen dataclass       commands   which sections a command has, and its words
options    flags and YAML → a dataclass of sections
"""
