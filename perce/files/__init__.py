"""Files, for all commands.

paths      paths that users give, and outputs that are also inputs     lock       one process at a time
outputs    files written in one move, never over those of others       integrity  whether a file is as it was written
network    whether files can be had from the Hub                       runs       which directories are runs
"""
