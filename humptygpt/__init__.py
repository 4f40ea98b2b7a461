"""The library of HumptyGPT: files that every run uses, and a folder for each other capability."""
