# Four blocks of attention and a feed-forward network. Article chapter: "The GPT architecture".
#
# In a GPT, each attention layer is followed by a feed-forward network, which has two thirds of the block's parameters.
# Would these parameters be more useful in more attention layers? Each step then takes longer, so there are two
# comparisons: after the same training time, and after the same number of steps.
#
#   python train.py config/article/09_feed_forward/3-with.py
#
# On 2 CPU cores it takes 29 s and reaches 2.488 bits per byte (2.463 to 2.511 across three seeds).

out_dir = "out/article/09_feed_forward/3-with"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 128
mlp = "plain"  # new
position = "rotary"
bias = True

# training
batch_size = 8
block_size = 128
max_iters = 500
optimizer = "normuon"
learning_rate = 0.006
muon_learning_rate = 0.02
muon_momentum = 0.95
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 20
dtype = "float32"  # auto can differ from machine to machine
eval_interval = 250
