# A modern GPT of the smallest GPT-2's size (124 million parameters), on the 10-billion-token sample of FineWeb.
#
#   python prepare_data.py fineweb --files=15     downloads 28 GB; without --files, only one file, 2 GB
#   python train.py config/fineweb.py
#
# It needs a GPU with 24 GB or more, and has not been measured here.

out_dir = "out/fineweb"
dataset = "fineweb"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
position = "rotary"
norm = "rmsnorm"
activation = "relu_squared"
qk_norm = True
vocab_size = 50304  # GPT-2's 50,257 tokens, padded to a multiple of 128, for faster matrix products on a GPU

batch_size = 16
gradient_accumulation_steps = 32  # 524,288 tokens per step
max_iters = 19000  # 10 billion tokens
learning_rate = 1e-3
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 500
eval_interval = 500
eval_iters = 200
