"""--minutes: a text and a time to a model, a schedule and a clock."""
