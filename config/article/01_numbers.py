# The first rung: letters as numbers. A network of neurons reads the newest 8 characters, each as one fixed number, and
# guesses the next.
# The article: "How does all this help generate language?".
#
#   python train.py config/article/01_numbers.py
#
# On 2 CPU cores it takes 9 s and ends at a validation loss of 4.17 bits per character.

out_dir = "out/article/01_numbers"
dataset = "shakespeare_char"
model = "window_mlp"
embedding = "number"  # a character is its place in the alphabet, divided by how many there are
n_embd = 1
window = 8
n_layer = 1
n_hidden = 256
activation = "relu"
bias = True

# the training: 1,310 times 768 characters, as many as on every rung
batch_size = 12
block_size = 64
max_iters = 1310
learning_rate = 2e-3
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 50
eval_interval = 110
