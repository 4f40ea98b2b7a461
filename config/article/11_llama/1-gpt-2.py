# GPT-2's architecture: learned positions, LayerNorm, GELU, bias terms, an output head tied to the embedding. Article
# chapter: "What makes large language models work so well?".
#
# This compares GPT-2's blocks with those of Llama 3.1, which is five years newer. Most of the gap in loss comes from
# the positional encoding: see 08_positions.
#
#   python train.py config/article/11_llama/1-gpt-2.py
#
# On 2 CPU cores it takes 28 s and reaches 2.716 bits per byte (2.691 to 2.730 across three seeds).

out_dir = "out/article/11_llama/1-gpt-2"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 128
norm = "layernorm"
mlp = "plain"
activation = "gelu"
position = "learned"
bias = True
tie_weights = True  # the output head reuses the embedding

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
