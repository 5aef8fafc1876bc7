"""Rows of any data set → batches of aligned token pairs.

sources    where rows are                            pairing   what pairs the rows of a format
formats    what a row means                          dataset   all pairs at once, cached
rows       rows → examples; bad ones named           stream    pairs read while training
retrieval  of a long history the few passages shown  splits    which examples are trained on, evaluated on, asked about
encoder    embeddings for retrieval                  batch     pairs → tensors
prompt     the words of a prompt
chat       persona and conversation → one text, and its ids
pairs      example → factual and counterfactual ids
documents  document → pieces and short contexts
"""
