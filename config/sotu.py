# A small GPT on 12 MB of clean English prose, the messages of US presidents to Congress since 1790, one document each.
# sentencepiece learns a vocabulary of 4,096 subwords.
#
#   python train.py config/sotu.py
#
# On 2 CPU cores it takes about 4 minutes and reaches a validation loss near 4.37 nats per token, 1.50 bits per byte.

out_dir = "out/sotu"
dataset = "sotu"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
position = "rotary"
activation = "relu_squared"
init = "zero"
tie_weights = False

batch_size = 8
max_iters = 2000
learning_rate = 2e-3
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 60
eval_interval = 500
