"""Rows of any data set → batches of aligned token pairs.

sources    where rows are                              pairing   chooses the builder of pairs for a format
formats    what a row means                            dataset   all pairs at once, cached
rows       rows → examples; errors of bad rows         stream    pairs read while training
retrieval  picks a few passages of a long history      splits    which examples are for training and evaluation
encoder    embeddings for retrieval                    batch     pairs → tensors
prompt     the words of a prompt
chat       persona and conversation → one text, and its ids
pairs      example → factual and counterfactual ids
documents  document → pieces and short contexts
"""
