# Twelve blocks in which each block's output replaces its input. Article chapter: "Residual connections".
#
# The model has twelve blocks, like the smallest GPT-2. Does it matter that each block adds its output to its input?
#
#   python train.py config/article/04_residual/1-without.py
#
# On 2 CPU cores it takes 33 s and reaches 4.830 bits per byte (4.829 to 4.830 across three seeds).

out_dir = "out/article/04_residual/1-without"
dataset = "shakespeare_char"

n_layer = 12
n_head = 4
n_embd = 64
block = "plain"  # no residual connections: f(norm(x))
position = "rotary"
bias = True

# training
batch_size = 8
block_size = 128
max_iters = 400
optimizer = "normuon"
learning_rate = 0.006
muon_learning_rate = 0.02
muon_momentum = 0.95
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 20
dtype = "float32"  # auto can differ from machine to machine
eval_interval = 400
