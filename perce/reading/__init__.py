"""What rows say: files of any kind and rows of any format → replies. Nothing here knows the options of a command.

sources    where rows are                              formats    the formats, and what each makes of a row
readers    a file's rows; csv_file reads CSV           detection  which format a row has
literals   lists that are stored as text               parsers    row → replies
fields     what the fields of a row may hold           joins      what a row needs from other files or rows
"""
