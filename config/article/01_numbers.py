# The first rung: characters as numbers. A neural network reads the last 8 characters, each as one fixed number, and
# predicts the next.
# The article: "How does all this help generate language?".
#
#   python train.py config/article/01_numbers.py
#
# On 2 CPU cores it takes 9 s and reaches a validation loss of 4.17 bits per character.

out_dir = "out/article/01_numbers"
dataset = "shakespeare_char"
model = "window_mlp"
embedding = "number"  # a character is its index in the vocabulary divided by the vocabulary size
n_embd = 1
window = 8
n_layer = 1
n_hidden = 256
activation = "relu"
bias = True

# training: 1,310 steps of 768 characters, about a million, as on every rung
batch_size = 12
block_size = 64
max_iters = 1310
learning_rate = 2e-3
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 50
eval_interval = 110
