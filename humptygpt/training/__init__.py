"""What a training run needs around its loop: settings, optimizers, evaluation, the run's folder, what fits in memory.

In: settings. Out: update rules, metrics, files of a run. It imports all rooms but page.
"""
