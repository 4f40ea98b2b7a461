# Embeddings: a character is a vector of 32 features instead of one number, and the vectors are trained.
# The article: "Embeddings".
#
#   python train.py config/article/02_embeddings.py
#
# On 2 CPU cores it takes 12 s and reaches a validation loss of 2.78 bits per character.

out_dir = "out/article/02_embeddings"
dataset = "shakespeare_char"
model = "window_mlp"
n_embd = 32  # new: the embedding dimension
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
