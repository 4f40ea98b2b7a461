# Llama 3.2 1B's architecture (1.24 billion parameters): RMSNorm, SwiGLU, rotary positions, grouped-query attention.
#
#   python train.py config/llama_1b.py --dry_run=True
#   torchrun --standalone --nproc_per_node=8 train.py config/llama_1b.py
#
# The tokenizer is GPT-2's, its vocabulary padded to the size of Llama's. The model has never been trained.
# --dry_run=True estimates the memory that it needs.

out_dir = "out/llama_1b"
dataset = "fineweb"

n_layer = 16
n_head = 32
n_kv_head = 8
n_embd = 2048
n_hidden = 8192
block_size = 2048
vocab_size = 128256
position = "rotary"
rope_base = 500000.0
norm = "rmsnorm"
mlp = "gated"
activation = "silu"
tie_weights = True

batch_size = 4
gradient_accumulation_steps = 128  # 1,048,576 tokens per step
checkpoint_activations = True
max_iters = 100000
learning_rate = 3e-4
beta2 = 0.95
warmup_iters = 2000
eval_interval = 1000
eval_iters = 200
