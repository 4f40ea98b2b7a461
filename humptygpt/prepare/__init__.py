"""Documents -> token files, and the built-in data sets."""
