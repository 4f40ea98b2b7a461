# A network reads the last 8 tokens. The article: "Self Attention".
#
# The article's own example: in "Damian had a secret child, a girl, and he had written in his will that all his
# belongings will belong to", the next word depends on one far back. The text is 40,000 such sentences, generated at
# random. A reader of the whole sentence is left with the random choices, 0.163 bits per byte; a reader of the last 8
# tokens has to guess more, 0.196.
#
#   python train.py config/article/03_attention/1-window.py
#
# On 2 CPU cores it takes 8 s and reaches 0.198 bits per byte, 0.198 to 0.198 with three seeds.

out_dir = "out/article/03_attention/1-window"
dataset = "wills"

model = "window_mlp"
n_embd = 32
window = 8
n_layer = 1
n_hidden = 96  # as many parameters as 2-attention.py
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
grad_clip = 1.0
eval_interval = 500
