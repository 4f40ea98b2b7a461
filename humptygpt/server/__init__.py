"""A model as a service over HTTP."""
