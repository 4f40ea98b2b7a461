"""--minutes: a model and a schedule for a text and a time limit. Also ensembles."""
