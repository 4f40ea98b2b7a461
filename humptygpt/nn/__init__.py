"""What networks are built from: layers, attention, the decoder's state, LoRA, the article's window network; devices.

In come tensors and a ModelConfig, out come tensors: no file, no process, no tokenizer. Which attention or random number
generator is fastest on a device is decided here, so that model.py can be read as formulas. It may import core.
"""
