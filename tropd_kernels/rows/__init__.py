"""The row engine: everything between the logits' GEMM and the gradient's GEMMs.

`engine` holds the interface, `RowEngine`, which each backend implements in a file of its own. The
forward gives each row, that is each token, a few coefficients of one gradient formula, the same for
all objectives. With p = softmax(z), q = softmax(t), lp = log p, lq = log q and K the row's top-k
set (the ids with lq >= THRESHOLD, or a top-k teacher's),

    dL/dz = p (P + REVERSE ((lp - lq) - KL(p||q)) - ENTROPY_WEIGHT (lp + H(p)))
            - Q q 1_K - LABEL 1[v = y] - UNIFORM + GENERATOR pg 1_K

with P_TOP_K in place of P on K: the two differ by up to q(off K)/p(off K), next to which a sum of
them would lose the smaller. pg = p f'(p/q) belongs to the rule's generator (P already holds minus
its sum). Coefficients from `Coef.P` on are linear in the row's weight, so an incoming gradient
multiplies only these.

Files: `layout` (what goes in and comes out), `rule` (gate and rule on vectors of rows, in torch),
`generators` (the f-divergences), `topk_teacher`, `torch_rows` (the twin to read), `native_rows`,
`triton_rows` and `triton_kernels`, `id_rows` (K of the student's or of given ids), `sharded` and
`sharded_search` (the vocabulary over ranks).
"""
