"""Rows → batches of aligned token pairs.

rows       rows → examples; errors of bad rows         pairing   chooses the builder of pairs for a format
retrieval  picks a few passages of a long history      dataset   all pairs at once, cached
encoder    embeddings for retrieval                    stream    pairs read while training
prompt     the words of a prompt                       splits    which examples are for training and evaluation
chat       persona and conversation → one text, ids    batch     pairs → tensors
pairs      example → factual and counterfactual ids
documents  document → pieces and short contexts
"""
