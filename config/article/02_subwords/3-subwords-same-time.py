# A network that reads subwords, trained for about as long as 1-characters.py. Article chapter: "Subword Tokenizers".
#
# The same network reads 8 tokens, either characters or subwords. Eight subwords span 19 characters on average, and
# each prediction covers 2.4 characters. But there are 1,024 subwords to learn, and the output head is larger. So there
# are two comparisons: after training on the same number of characters, and after the same number of seconds.
#
#   python train.py config/article/02_subwords/3-subwords-same-time.py
#
# On 2 CPU cores it takes 23 s and reaches 2.465 bits per byte (2.453 to 2.479 across three seeds).

out_dir = "out/article/02_subwords/3-subwords-same-time"
dataset = "shakespeare_sp"  # new: 1,024 subwords learned by sentencepiece

model = "window_mlp"
n_embd = 32
window = 8
n_layer = 1
n_hidden = 256
activation = "relu"
bias = True

# training
batch_size = 12
block_size = 64
max_iters = 2500  # takes about as long as 1-characters.py
learning_rate = 0.002
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 50
dtype = "float32"  # auto can differ from machine to machine
eval_interval = 1250
