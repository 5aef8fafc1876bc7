"""Files, for all commands.

outputs    paths that users give, and files written in one move
lock       one process at a time
integrity  whether a file is as it was written
"""
