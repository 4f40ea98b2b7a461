# Twelve blocks that do not normalise their input. Article chapter: "Layer Normalization".
#
# The model has twelve blocks with residual connections, like the smallest GPT-2, and is trained with AdamW. Does it
# matter that each block normalises its input?
#
#   python train.py config/article/05_norm/1-without.py
#
# On 2 CPU cores it takes 33 s and reaches 3.402 bits per byte (3.339 to 3.442 across three seeds).

out_dir = "out/article/05_norm/1-without"
dataset = "shakespeare_char"

n_layer = 12
n_head = 4
n_embd = 64
norm = "none"  # the norms do nothing
bias = True

# training
batch_size = 12
block_size = 64
max_iters = 800
learning_rate = 0.002
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 50
dtype = "float32"  # auto can differ from machine to machine
eval_interval = 800
