# A GPT without dropout, so nothing keeps it from memorising its text. Article chapter: "Dropout".
#
# The text is short, a tenth of tiny Shakespeare, and is read 18 times, so a model can memorise it. Dropout is meant for
# this case. The reported loss is the final one: without dropout, the loss is lowest halfway through and then rises.
#
#   python train.py config/article/06_dropout/1-without.py
#
# On 2 CPU cores it takes 65 s and reaches 3.434 bits per byte (3.410 to 3.453 across three seeds).

out_dir = "out/article/06_dropout/1-without"
dataset = "shakespeare_char_tenth"

n_layer = 4
n_head = 4
n_embd = 64
position = "rotary"
bias = True

# training
batch_size = 8
block_size = 128
max_iters = 2000
optimizer = "normuon"
learning_rate = 0.006
muon_learning_rate = 0.02
muon_momentum = 0.95
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 20
dtype = "float32"  # auto can differ from machine to machine
eval_interval = 2000
