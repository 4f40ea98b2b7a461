# A block with one attention head of dimension 64. Article chapter: "Multi-head Attention".
#
# The model has one block and reads the sentences of 03_attention. A head weights the earlier tokens in only one way,
# but the next word depends both on the last few words and on words far back.
#
#   python train.py config/article/07_heads/1-one.py
#
# On 2 CPU cores it takes 13 s and reaches 0.190 bits per byte (0.188 to 0.193 across three seeds).

out_dir = "out/article/07_heads/1-one"
dataset = "wills"

n_layer = 1
n_head = 1  # four in 2-four.py
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
