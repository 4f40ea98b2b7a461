# A small GPT with GPT-2's vocabulary of 50,257 tokens, most of which do not occur in tiny Shakespeare. Most of the
# training time is spent in the output head, which predicts a probability for each token. On such a small text, models
# with characters or a small vocabulary learn more in the same time.
#
#   python train.py config/shakespeare.py
#
# On one CPU core with bfloat16 instructions it takes about 3 minutes and reaches a validation loss near 5.13 nats per
# token, 2.39 bits per byte.

out_dir = "out/shakespeare"
dataset = "shakespeare"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64  # context of 64 tokens, about 200 characters
position = "rotary"
activation = "relu_squared"
dropout = 0.1

batch_size = 12
max_iters = 400
learning_rate = 2e-3
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 40
eval_interval = 100
