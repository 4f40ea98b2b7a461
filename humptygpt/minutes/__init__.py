"""--minutes: choose a model and a schedule for a text and a time limit, and end training on time."""
