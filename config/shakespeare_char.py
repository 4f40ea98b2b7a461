# A small GPT that writes like Shakespeare, one character at a time. This is the demo, and the place to start.
#
#   python train.py config/shakespeare_char.py
#
# The model has 0.81 million parameters. On 2 CPU cores with bfloat16 instructions, training takes 2 to 3 minutes and
# reaches a validation loss of 1.4530 nats per character. RECORDS.md says what else was tried.

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"  # tiny Shakespeare: 1.1 million characters

# the model
n_layer = 4
n_head = 2
n_embd = 128
block_size = 256  # context of 256 characters
position = "rotary"
activation = "relu_squared"
mlp_conv = 3  # each feed-forward network also sees the three previous characters
qk_norm = True
init = "zero"  # each block starts as the identity
tie_weights = False

# the training
batch_size = 4  # small, because many steps matter more than precise gradients
max_iters = 2400
optimizer = "normuon"
learning_rate = 6e-3
muon_learning_rate = 0.03
muon_momentum = 0.85
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.1  # limits overfitting over 2.4 epochs
grad_clip = 0.0
eval_interval = 600
