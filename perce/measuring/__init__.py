"""Measurements of how a model uses the persona.

inference       a model and the examples to measure it on     records            JSON Lines files that can be resumed
scores          PerContrast's statistics, token by token      score_report       what perce.score shows of them
identification  does PIR find the personal tokens?            evaluation_report  metrics with intervals
evaluation      losses under three prompts, and replies       comparison         results of several models compared
metrics         ROUGE, METEOR, bootstrap, AUC
"""
