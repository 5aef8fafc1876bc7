"""What a model does with the persona, by numbers.

inference       a model and the examples it is asked about    records            JSON lines that a second run continues
scores          PerContrast's statistics, token by token      score_report       what perce.score shows of them
identification  does PIR find the personal tokens?            evaluation_report  metrics with intervals, comparisons
evaluation      losses under three prompts, and replies       metrics            ROUGE, METEOR, bootstrap, AUC
"""
