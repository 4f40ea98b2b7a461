"""How fast this program is beside others: bench.py starts one of the modes here.

A mode (step_time, time_to_loss, step_profile, generation, keystrokes) takes the settings of bench.py and returns plain
figures; a rival (nanogpt, huggingface, ctranslate2, llamacpp), like our own side (ours), is what it measures. The
rivals are imported only where they are measured. All of the package and train.py may be imported; nothing imports this.
"""
