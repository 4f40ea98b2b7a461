"""The HumptyGPT library: modules that every run uses, plus a subpackage for each additional capability."""
