"""Pictures. Nothing here knows of models or data.

heatmap    scored responses; in the terminal     page       the HTML page of them, with page.html, .css and .js
embedded   what a page holds of them             curves     the log of a run as a PNG
"""
