"""Pictures. Nothing here knows of models or data.

heatmap   tokens tinted by weight: HTML and terminal      curves   the log of a run as a PNG
"""
