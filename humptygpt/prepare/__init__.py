"""Documents to token files, and the data sets that are built in."""
