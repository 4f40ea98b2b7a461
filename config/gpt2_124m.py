# The smallest GPT-2 (124 million parameters), trained on an open reproduction of its training text.
#
#   python prepare_data.py openwebtext --files=80     downloads 24 GB; without --files, only one file, 300 MB
#   python train.py config/gpt2_124m.py
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py     on 8 GPUs
#
# It needs a GPU with 24 GB or more, and has not been measured here. nanoGPT reports a loss of 2.85 after 600,000 steps
# on 8 A100s.

out_dir = "out/gpt2_124m"
dataset = "openwebtext"

# the sizes; GPT-2's blocks, without biases, are the default
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
activation = "gelu_tanh"
vocab_size = 50304  # GPT-2's 50,257 tokens, padded to a multiple of 128, for faster matrix products on a GPU

batch_size = 12
gradient_accumulation_steps = 40  # 491,520 tokens per step
max_iters = 600000
learning_rate = 6e-4
beta2 = 0.95
warmup_iters = 2000
eval_interval = 1000
eval_iters = 200
