"""Speed compared with other programs, for python -m benchmarks, and the experiments that RECORDS.md cites.

It runs one mode (step_time, time_to_loss, step_profile, generation, keystrokes, gpu), which takes its settings and
returns plain figures. A mode measures this program (ours) and its rivals (nanogpt, huggingface, ctranslate2,
llamacpp), whose packages are imported only when they are measured. random_crops and law are scripts of their own.
Nothing else imports this package.
"""
