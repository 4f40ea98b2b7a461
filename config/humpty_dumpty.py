# One nursery rhyme, learnt by heart: the smallest thing that a language model can do.
#
#   python train.py config/humpty_dumpty.py
#   python sample.py --out_dir=out/humpty_dumpty --start="Humpty Dumpt" --temperature=0
#
# Both together take about 15 seconds on one CPU core; the second prints the rhyme, over and over. The data is the
# rhyme ten times over: nine to learn from, and the tenth, which the validation loss is measured on, is the same once
# again. So the loss, near 0.003, says how well the rhyme is known by heart, and nothing about any other text.

out_dir = "out/humpty_dumpty"
dataset = "humpty_dumpty"

# the model: that of the demo, half as large
n_layer = 2
n_head = 2
n_embd = 64
block_size = 1280  # nearly all of it: each block starts in the first line, not in the second, which begins alike
position = "rotary"
activation = "relu_squared"
init = "zero"
tie_weights = False

# the training
batch_size = 1
max_iters = 120
learning_rate = 1e-2
warmup_iters = 10
eval_interval = 40
