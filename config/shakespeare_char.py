# A small GPT that writes like Shakespeare, character by character: the demo, and the place to start from.
#
#   python train.py config/shakespeare_char.py
#
# On 2 CPU cores it takes a little over two minutes and ends at a validation loss near 1.67 nats per character.

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"  # tiny Shakespeare: 1.1 million characters

# the model: GPT-2's, but for the last four lines
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64  # looks back on 64 characters
position = "rotary"
activation = "relu_squared"
init = "zero"  # each block starts by changing nothing
tie_weights = False

# the training
batch_size = 12
max_iters = 2000
learning_rate = 2e-3
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 60
eval_interval = 500
eval_iters = 150  # all of tiny Shakespeare's validation split, and as much of a larger text
