"""Everything between the entry scripts and the models: arguments, training, evaluation, metrics, files, reports."""
