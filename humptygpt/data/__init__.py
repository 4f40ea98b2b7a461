"""Documents, pairs and conversations -> tokens -> data/<name> -> batches."""
