"""Any source to a model and its tokenizer, and a model to the formats of others.

In: a run, a checkpoint, Hugging Face's and PEFT's folders, a name of the hub, nanoGPT's ckpt.pt. Out: a model, or those
formats and GGUF. It imports checkpoint and what is below it.
"""
