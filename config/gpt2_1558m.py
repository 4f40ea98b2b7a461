# GPT-2's largest size (1.56 billion parameters) and architecture, on an open version of its training text.
#
#   python prepare_data.py openwebtext --files=80     downloads 24 GB; without --files, only one file, 300 MB
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_1558m.py
#
# It has never been trained. --dry_run=True estimates the memory that it needs.

out_dir = "out/gpt2_1558m"
dataset = "openwebtext"

# the sizes; GPT-2's blocks, without biases, are the default
n_layer = 48
n_head = 25
n_embd = 1600
block_size = 1024
vocab_size = 50304  # GPT-2's 50,257 tokens, padded to a multiple of 128, for faster matrix products on a GPU

batch_size = 8
gradient_accumulation_steps = 64  # 524,288 tokens per step
checkpoint_activations = True
max_iters = 600000
learning_rate = 2e-4
beta2 = 0.95
warmup_iters = 2000
eval_interval = 1000
eval_iters = 200
