"""The tables of docs/scaling.md: a 32B student and a 235B teacher on 64 GPUs, on paper.

    python -m benchmarks.scaling            prints the tables
    python -m benchmarks.scaling --write    rewrites them in docs/scaling.md
    python -m benchmarks.scaling --check    measures the small runs on this CPU (a minute); writes
                                            benchmarks/results/scaling_cpu.json

Formulas, a token being one position of a completion, bf16 weights and hidden states:

    teacher's signal   V x 4 or 2, g x 2, k x (4 + 4) + 4, 4, or JSON: bytes a token
    loss               3 S + T with a teacher's head, 3 S without; S = 2 V h, T = 2 V g
    student            6 P, teacher 2 P_active, generation 2 P: FLOP a token, P without embeddings
    head, stored in shards and gathered once a call    2 V h (n - 1) / n received by each of n
    head, over the vocabulary of a group of n          weights, logits and work V / n; sums of a few
                                                       numbers a token, and of d_hidden

Attention's own products (which grow with the context) and the router are left out, so the loss's
shares are upper bounds. What a call of `linear_distillation_loss` does is asked of `plan_chunks`.
The machine's rates below are a data sheet's or assumed; no figure for a GPU was measured.

Sources: model cards and configurations of Qwen3-32B and Qwen3-235B-A22B, and the Qwen3 technical
report (arXiv 2505.09388); NVIDIA's data sheets of the H100 SXM and of NDR InfiniBand.
"""
