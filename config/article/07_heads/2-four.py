# A block with four attention heads of dimension 16, which have as many parameters as one head of 64. Article chapter:
# "Multi-head Attention".
#
# The model has one block and reads the sentences of 03_attention. A head weights the earlier tokens in only one way,
# but the next word depends both on the last few words and on words far back.
#
#   python train.py config/article/07_heads/2-four.py
#
# On 2 CPU cores it takes 16 s and reaches 0.171 bits per byte with each of three seeds.

out_dir = "out/article/07_heads/2-four"
dataset = "wills"

n_layer = 1
n_head = 4  # new
n_embd = 64
position = "rotary"
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
