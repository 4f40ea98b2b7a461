# A network that reads the last 8 tokens. Article chapter: "Self Attention".
#
# The text is 40,000 sentences like the article's own example, generated at random: "Damian had a secret child, a girl,
# and he had written in his will that all his belongings will belong to". The next word depends on a word far back. A
# model that reads the whole sentence has to guess only the random choices, so its lowest possible loss is 0.163 bits
# per byte. For a model that reads only the last 8 tokens, it is 0.196.
#
#   python train.py config/article/03_attention/1-window.py
#
# On 2 CPU cores it takes 8 s and reaches 0.198 bits per byte with each of three seeds.

out_dir = "out/article/03_attention/1-window"
dataset = "wills"

model = "window_mlp"
n_embd = 32
window = 8
n_layer = 1
n_hidden = 96  # gives the same number of parameters as 2-attention.py
activation = "relu"
bias = True

# training
batch_size = 8
block_size = 128
max_iters = 1500
optimizer = "normuon"
learning_rate = 0.006
muon_learning_rate = 0.02
muon_momentum = 0.95
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 20
dtype = "float32"  # auto can differ from machine to machine
eval_interval = 500
