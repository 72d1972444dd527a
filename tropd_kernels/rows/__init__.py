"""The row engine: all that stands between the logits' GEMM and the gradient's GEMMs.

One interface, one file per backend. A row is one token's logits. The engine makes two calls on a
chunk of rows:

    forward(batch, options, into)      -> stats (Stat, n) and coefs (Coef, n)
    gradient(batch, coefs, options, out)   writes d_logits (n, V)

`into` are the two matrices that it fills: columns of those of a whole call, NaN and 0 so far. None
makes new ones.

`coefs` are the per-row numbers of `losses`' one gradient formula: with p = softmax(z), q =
softmax(t), lp = log p, lq = log q and K the row's top-k set (here the ids with lq >= THRESHOLD, or
those given),

    dL/dz = p (P + REVERSE ((lp - lq) - KL(p||q)) - ENTROPY_WEIGHT (lp + H(p)))
            - Q q 1_K - LABEL 1[v = y] + GENERATOR pg 1_K

with P_TOP_K in place of P on K: the two differ by up to q(off K)/p(off K), next to which a sum of
them would lose the smaller. pg = p f'(p/q) belongs to the rule's generator (P already holds minus
its sum). Rows from `Coef.P` on are linear in the row's weight, so an incoming gradient multiplies
them alone.

Where the vocabulary is sharded over ranks, `sharded` stands between the loop and the backend with
the same two calls, and makes them of the backend's passes over a part of each row:

    statistics(batch, options, into)            stats and coefs by the part's own normalisers
    sums(batch, options, gated, stats, coefs)   by the normalisers and THRESHOLD of the whole rows
    gradient(...)                               as above, likewise

Files: `layout` (this interface's data), `rule` (gate and rule on vectors of rows, in torch),
`generators` (the f-divergences), `torch_rows` (the twin to read), `native_rows`, `triton_rows` and
`triton_kernels`, `sharded` and `sharded_search`.
"""
