# A network that sees a character as a vector of 32 trained features. Article chapter: "Embeddings".
#
# A network of 256 neurons reads the last 8 characters and predicts the next one. Should it see a character as one
# number, or as a vector of features that are trained along with the weights?
#
#   python train.py config/article/01_embeddings/2-embedding.py
#
# On 2 CPU cores it takes 5 s and reaches 2.738 bits per byte (2.735 to 2.739 across three seeds).

out_dir = "out/article/01_embeddings/2-embedding"
dataset = "shakespeare_char"

model = "window_mlp"
n_embd = 32  # new: the embedding dimension
window = 8
n_layer = 1
n_hidden = 256
activation = "relu"
bias = True

# training
batch_size = 12
block_size = 64
max_iters = 1500
learning_rate = 0.002
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 50
dtype = "float32"  # auto can differ from machine to machine
eval_interval = 500
