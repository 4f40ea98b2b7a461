# nanoGPT's defaults: GPT-2's smallest size on OpenWebText. nanoGPT's config files build on them, so name this file
# first:
#
#   python train.py config/nanogpt.py nanoGPT/config/train_gpt2.py
#   python train.py config/nanogpt.py nanoGPT/config/eval_gpt2.py
#   python train.py config/nanogpt.py nanoGPT/config/finetune_shakespeare.py
#
# The last two start from GPT-2 and use its shape and its vocabulary of 50,257 tokens. Device, dtype and compile
# keep the defaults for this machine. The models need a GPU and have not been trained yet.

out_dir = "out"
dataset = "openwebtext"
eval_interval = 2000
eval_iters = 200
log_interval = 1
wandb_project = "owt"
wandb_run_name = "gpt2"

# the sizes; nanoGPT's blocks and its optimizer, AdamW, are the default
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
bias = False
dropout = 0.0
# GPT-2's 50,257 tokens, padded; for data with another tokenizer, add --vocab_size=None
vocab_size = 50304

batch_size = 12
gradient_accumulation_steps = 40
max_iters = 600000
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
lr_decay_iters = 600000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
