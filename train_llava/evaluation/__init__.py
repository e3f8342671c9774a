"""Generation, question files, answers, metrics, plots."""
