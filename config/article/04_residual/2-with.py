# Twelve blocks in which each block's output is added to its input. Article chapter: "Residual connections".
#
# The model has twelve blocks, like the smallest GPT-2. Does it matter that each block adds its output to its input?
#
#   python train.py config/article/04_residual/2-with.py
#
# On 2 CPU cores it takes 28 s and reaches 2.694 bits per byte (2.673 to 2.708 across three seeds).

out_dir = "out/article/04_residual/2-with"
dataset = "shakespeare_char"

n_layer = 12
n_head = 4
n_embd = 64
block = "pre_norm"  # new: x + f(norm(x)), so that gradients reach every block
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
