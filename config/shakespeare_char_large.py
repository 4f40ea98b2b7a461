# A larger GPT on tiny Shakespeare: the demo with six layers of 192 features.
#
#   python train.py config/shakespeare_char_large.py
#
# The model has 2.69 million parameters. On one CPU core with bfloat16 instructions, training takes about 25 minutes
# and reaches a validation loss of 1.4110 nats per character. RECORDS.md says what else was tried.

out_dir = "out/shakespeare_char_large"
dataset = "shakespeare_char"  # tiny Shakespeare: 1.1 million characters

# the model
n_layer = 6
n_head = 3
n_embd = 192
block_size = 512  # context of 512 characters
position = "rotary"
activation = "relu_squared"
mlp_conv = 3  # each feed-forward network also sees the three previous characters
qk_norm = True
init = "zero"  # each block starts as the identity
tie_weights = False
dropout = 0.12  # limits overfitting over 5 epochs

# the training
batch_size = 2
max_iters = 4500
optimizer = "normuon"
learning_rate = 6e-3
muon_learning_rate = 0.03
muon_momentum = 0.85
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.07
grad_clip = 0.0
eval_interval = 1125
