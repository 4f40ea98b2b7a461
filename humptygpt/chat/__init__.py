"""Conversations: a model that answers, and an API that programs know."""
