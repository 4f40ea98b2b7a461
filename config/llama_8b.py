# The architecture of Llama 3 8B (8.03 billion parameters): RMSNorm, SwiGLU, rotary positions, grouped-query attention.
#
#   python train.py config/llama_8b.py --dry_run=True
#   torchrun --standalone --nproc_per_node=8 train.py config/llama_8b.py --parallel=fsdp
#
# The model, its gradients and optimizer state do not fit on one GPU: use --parallel=fsdp on 8 GPUs of 80 GB or more.
# The tokenizer is GPT-2's, its vocabulary padded to the size of Llama's. The model has never been trained.
# --dry_run=True estimates the memory that it needs.

out_dir = "out/llama_8b"
dataset = "fineweb"

n_layer = 32
n_head = 32
n_kv_head = 8
n_embd = 4096
n_hidden = 14336
block_size = 2048
vocab_size = 128256
position = "rotary"
rope_base = 500000.0
norm = "rmsnorm"
mlp = "gated"
activation = "silu"
tie_weights = False

batch_size = 1
gradient_accumulation_steps = 512  # 1,048,576 tokens per step
checkpoint_activations = True
max_iters = 100000
learning_rate = 3e-4
beta2 = 0.95
warmup_iters = 2000
eval_interval = 1000
eval_iters = 200
