# A GPT with four blocks that reads up to 128 characters. Article chapter: "The GPT architecture".
#
# A network like the one in the first experiment is compared with a GPT that has all the parts added since, with the
# same number of parameters and the same amount of text. How much do these parts help?
#
#   python train.py config/article/10_gpt/2-gpt.py
#
# On 2 CPU cores it takes 30 s and reaches 2.488 bits per byte (2.463 to 2.511 across three seeds).

out_dir = "out/article/10_gpt/2-gpt"
dataset = "shakespeare_char"

n_layer = 4  # this line and the seven below are new
n_head = 4
n_embd = 128
block = "pre_norm"
norm = "layernorm"
mlp = "plain"
activation = "gelu"
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
