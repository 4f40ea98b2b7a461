# A network with two hidden layers that reads the last 16 characters. Article chapter: "The GPT architecture".
#
# A network like the one in the first experiment is compared with a GPT that has all the parts added since, with the
# same number of parameters and the same amount of text. How much do these parts help?
#
#   python train.py config/article/10_gpt/1-window.py
#
# On 2 CPU cores it takes 28 s and reaches 2.586 bits per byte (2.574 to 2.602 across three seeds).

out_dir = "out/article/10_gpt/1-window"
dataset = "shakespeare_char"

model = "window_mlp"
n_embd = 32
window = 16
n_layer = 2
n_hidden = 640  # gives the same number of parameters as 2-gpt.py
activation = "relu"
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
