// Hyper-connections in two launches: the first mixes the streams (where a sublayer ends) and takes parts of the product
// with `fn` and of the mean square; the second adds the parts, makes the weights, collapses the streams and norms them.

namespace v4c {

constexpr int MHC_THREADS = 256;

// Parts [tokens, splits, LOGITS + 1]: of logits and, last, of the sum of squares. Grid (tokens, splits); a split takes
// a run of the D columns of all streams. MIX: `mixed` = post x + comb^T streams is written, and what follows reads it.
template <int M, int D, int LOGITS, bool MIX>
V4C_DEVICE void mhc_logits(const float* x, const float* streams, const float* post, const float* comb, const float* fn,
                           float* mixed, float* parts) {
  const int64_t token = blockIdx.x;
  const int run = (D + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * run, end = smaller(D, begin + run);
  __shared__ float weights[M + M * M], partial[MHC_THREADS / WARP][LOGITS + 1];
  if constexpr (MIX) {
    for (int i = threadIdx.x; i < M + M * M; i += MHC_THREADS)
      weights[i] = i < M ? post[token * M + i] : comb[token * M * M + i - M];
    __syncthreads();
  }
  float sums[LOGITS], squares = 0;
#pragma unroll
  for (int i = 0; i < LOGITS; ++i) sums[i] = 0;
  for (int d = begin + threadIdx.x; d < end; d += MHC_THREADS) {
    float old[M], now[M];
#pragma unroll
    for (int k = 0; k < M; ++k) old[k] = streams[(token * M + k) * D + d];
    if constexpr (MIX) {
      const float added = x[token * D + d];
#pragma unroll
      for (int k = 0; k < M; ++k) {
        now[k] = weights[k] * added;
#pragma unroll
        for (int j = 0; j < M; ++j) now[k] = fmaf(weights[M + j * M + k], old[j], now[k]);
        mixed[(token * M + k) * D + d] = now[k];
      }
    } else {
#pragma unroll
      for (int k = 0; k < M; ++k) now[k] = old[k];
    }
#pragma unroll
    for (int k = 0; k < M; ++k) {
      squares = fmaf(now[k], now[k], squares);
#pragma unroll
      for (int i = 0; i < LOGITS; ++i) sums[i] = fmaf(now[k], fn[(i * M + k) * static_cast<int64_t>(D) + d], sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < LOGITS; ++i) {
    const float sum = warp_sum(sums[i]);
    if (lane() == 0) partial[warp()][i] = sum;
  }
  squares = warp_sum(squares);
  if (lane() == 0) partial[warp()][LOGITS] = squares;
  __syncthreads();
  for (int i = threadIdx.x; i <= LOGITS; i += MHC_THREADS) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < MHC_THREADS / WARP; ++w) total += partial[w][i];
    parts[(token * gridDim.y + blockIdx.y) * (LOGITS + 1) + i] = total;
  }
}

// The logits of a token from its parts, into shared memory.
template <int M, int D, int LOGITS, int SPLITS>
V4C_DEVICE void join_logits(const float* parts, float norm_eps, float* logits) {
  parts += blockIdx.x * static_cast<int64_t>(SPLITS) * (LOGITS + 1);
  if (threadIdx.x < LOGITS) {
    float sum = 0, squares = 0;
    for (int i = 0; i < SPLITS; ++i) {
      sum += parts[i * (LOGITS + 1) + threadIdx.x];
      squares += parts[i * (LOGITS + 1) + LOGITS];
    }
    logits[threadIdx.x] = sum * rsqrtf(squares / (M * D) + norm_eps);
  }
  __syncthreads();
}

// Softmax of the rows, then Sinkhorn-Knopp: by turns, columns and rows are made to sum to one. One thread.
template <int M>
V4C_DEVICE void sinkhorn(float (&comb)[M][M], int iterations, float eps) {
#pragma unroll
  for (int i = 0; i < M; ++i) {
    float highest = comb[i][0], sum = 0;
#pragma unroll
    for (int j = 1; j < M; ++j) highest = fmaxf(highest, comb[i][j]);
#pragma unroll
    for (int j = 0; j < M; ++j) comb[i][j] = expf(comb[i][j] - highest), sum += comb[i][j];
#pragma unroll
    for (int j = 0; j < M; ++j) comb[i][j] = comb[i][j] / sum + eps;
  }
  for (int turn = 0; turn < iterations; ++turn) {
    if (turn > 0) {
#pragma unroll
      for (int i = 0; i < M; ++i) {
        float sum = eps;
#pragma unroll
        for (int j = 0; j < M; ++j) sum += comb[i][j];
#pragma unroll
        for (int j = 0; j < M; ++j) comb[i][j] /= sum;
      }
    }
#pragma unroll
    for (int j = 0; j < M; ++j) {
      float sum = eps;
#pragma unroll
      for (int i = 0; i < M; ++i) sum += comb[i][j];
#pragma unroll
      for (int i = 0; i < M; ++i) comb[i][j] /= sum;
    }
  }
}

// Collapsed streams, normed where NORM. Grid (tokens). `pre` [M] in shared memory.
template <int M, int D, bool NORM>
V4C_DEVICE void collapse(const float* streams, const float* pre, const float* norm, float eps, float* y) {
  const int64_t token = blockIdx.x;
  constexpr int COLUMNS = (D + MHC_THREADS - 1) / MHC_THREADS;
  float squares = 0, held[COLUMNS];
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    const int d = i * MHC_THREADS + threadIdx.x;
    held[i] = 0;
    if (d < D) {
#pragma unroll
      for (int k = 0; k < M; ++k) held[i] = fmaf(pre[k], streams[(token * M + k) * D + d], held[i]);
    }
    squares = fmaf(held[i], held[i], squares);
  }
  float factor = 1;
  if constexpr (NORM) factor = rsqrtf(block_sum<MHC_THREADS>(squares) / D + eps);
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    const int d = i * MHC_THREADS + threadIdx.x;
    if (d < D) y[token * D + d] = NORM ? held[i] * factor * norm[d] : held[i];
  }
}

// Grid (tokens): weights of a sublayer's entry, and its input.
template <int M, int D, int SPLITS, bool NORM>
V4C_DEVICE void mhc_enter(const float* parts, const float* streams, const float* base, const float* scale,
                          const float* norm, int iterations, float hc_eps, float norm_eps, float eps, float* y,
                          float* post, float* comb) {
  constexpr int LOGITS = (2 + M) * M;
  __shared__ float logits[LOGITS], pre[M];
  const int64_t token = blockIdx.x;
  join_logits<M, D, LOGITS, SPLITS>(parts, norm_eps, logits);
  if (threadIdx.x < M) {
    pre[threadIdx.x] = sigmoid(logits[threadIdx.x] * scale[0] + base[threadIdx.x]) + hc_eps;
    const int i = M + threadIdx.x;
    post[token * M + threadIdx.x] = 2 * sigmoid(logits[i] * scale[1] + base[i]);
  }
  __syncthreads();
  if (threadIdx.x == MHC_THREADS - 1) {  // while the others begin to collapse
    float matrix[M][M];
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int j = 0; j < M; ++j) {
        const int at = 2 * M + i * M + j;
        matrix[i][j] = logits[at] * scale[2] + base[at];
      }
    sinkhorn<M>(matrix, iterations, hc_eps);
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int j = 0; j < M; ++j) comb[token * M * M + i * M + j] = matrix[i][j];
  }
  collapse<M, D, NORM>(streams, pre, norm, eps, y);
}

// Grid (tokens): the streams after the last layer.
template <int M, int D, int SPLITS>
V4C_DEVICE void mhc_leave(const float* parts, const float* streams, const float* base, const float* scale,
                          float hc_eps, float norm_eps, float* y) {
  __shared__ float logits[M], pre[M];
  join_logits<M, D, M, SPLITS>(parts, norm_eps, logits);
  if (threadIdx.x < M) pre[threadIdx.x] = sigmoid(logits[threadIdx.x] * scale[0] + base[threadIdx.x]) + hc_eps;
  __syncthreads();
  collapse<M, D, false>(streams, pre, nullptr, 0, y);
}

// Grid (tokens, ceil(D / 256)): streams_k = post_k x + sum over j of comb[j, k] streams_j.
template <int M, int D>
V4C_DEVICE void mhc_post(const float* x, const float* streams, const float* post, const float* comb, float* out) {
  const int64_t token = blockIdx.x;
  const int d = blockIdx.y * MHC_THREADS + threadIdx.x;
  if (d >= D) return;
#pragma unroll
  for (int k = 0; k < M; ++k) {
    float now = post[token * M + k] * x[token * D + d];
#pragma unroll
    for (int j = 0; j < M; ++j) now = fmaf(comb[(token * M + j) * M + k], streams[(token * M + j) * D + d], now);
    out[(token * M + k) * D + d] = now;
  }
}

}  // namespace v4c
