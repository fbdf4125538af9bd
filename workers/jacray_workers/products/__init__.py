"""What is made from Jacobians where they are, so that the Jacobians themselves never travel.

| result | for the sample's Jacobian `J_i`, `(rows, columns)` over all leaves | shape |
|---|---|---|
| `mean_jacobian` | mean over samples of `J_i` | `(*out, *leaf)` |
| `norms` | the Frobenius norm of `J_i` | `(N,)` |
| `singular_values` | of `J_i`, largest first, all or the `top_k` | `(N, rank)` |
| `logabsdet` | log of the absolute determinant of a square `J_i` | `(N,)` |
| `gram` | sum over samples of `J_i^T J_i` (over N: the average gradient outer product) | `(*leaf, *leaf)` |
| `ggn`, `fisher` | sum over samples of `J_i^T H_i J_i`, see `curvature` | `(*leaf, *leaf)` |
| these three with `vectors` | the same matrix times each vector, never formed | `(K, *leaf)` |
| `ntk` | `J_i J_j^T` for every pair of samples, or its trace over the rows | `(N, N, rows, rows)`, `(N, N)` |

Modules: `needs` says what a request is made from and refuses what cannot be, `sums` adds up over samples, `spectrum`
and `krylov` find singular values, `pairs` multiplies Jacobians of different samples.
"""

from jacray_workers.products.needs import FROM_JACOBIAN, check, memory, refuse_large, separable, width, work

__all__ = ["FROM_JACOBIAN", "check", "memory", "refuse_large", "separable", "width", "work"]
