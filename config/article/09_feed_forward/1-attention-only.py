# Twelve blocks without feed-forward networks, trained for about as long as 3-with.py. Article chapter: "The GPT
# architecture".
#
# In a GPT, each attention layer is followed by a feed-forward network, which has two thirds of the block's parameters.
# Would these parameters be more useful in more attention layers? Each step then takes longer, so there are two
# comparisons: after the same training time, and after the same number of steps.
#
#   python train.py config/article/09_feed_forward/1-attention-only.py
#
# On 2 CPU cores it takes 32 to 38 s and reaches 2.677 bits per byte (2.665 to 2.690 across three seeds).

out_dir = "out/article/09_feed_forward/1-attention-only"
dataset = "shakespeare_char"

n_layer = 12  # gives the same number of parameters as 3-with.py
n_head = 4
n_embd = 128
mlp = "none"  # no feed-forward network
position = "rotary"
bias = True

# training
batch_size = 8
block_size = 128
max_iters = 360  # takes about as long as 3-with.py
optimizer = "normuon"
learning_rate = 0.006
muon_learning_rate = 0.02
muon_momentum = 0.95
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 20
dtype = "float32"  # auto can differ from machine to machine
eval_interval = 180
eval_iters = 75  # as many batches per evaluation as in the other two configs
