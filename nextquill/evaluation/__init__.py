"""The evaluation of a model on records: scores, generated texts, measures with intervals, and paired tests.

Runs a model:

    evaluate.py        a whole evaluation, from records to a folder; options.py and identity.py belong to it
    scoring.py         the nll of every response token, with, without and under another user's history
    calibration.py     how sure the model is of each response token, and its nll at other temperatures
    preferences.py     chosen against rejected responses
    judge.py           whose text it is, by a language model
    prose.py           the nll of general prose
    item_effects.py    the effect of every single history item

Works on numbers and texts alone, from whatever model:

    metrics/           metrics of texts, labels, ratings and preferences
    tasks.py           the public tasks
    text_measures.py   the metrics of texts that were written for records
    measures.py        measures over all examples, and their names
    token_measures.py  measures of tokens that follow from sums over examples
    personal_tokens.py which tokens are personal: as an untrained model finds, or as the records say
    bootstrap.py       intervals, and paired differences of two runs, or of two methods with several seeds
    permutation.py     p-values by exchanging, and their correction for several comparisons
    results.py         the files of an evaluation's folder, written and read
    compare.py         several evaluations, paired example by example
    predictions.py     the prediction files that other scorers read
"""
