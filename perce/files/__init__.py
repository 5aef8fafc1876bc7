"""Files, for all commands.

lock       one process at a time
integrity  whether a file is as it was written
"""
