// Work on single rows: norms, rotations of queries and keys, SwiGLU, routing.

namespace v4c {

// Grid (rows), 256 threads.
template <int D, bool WEIGHTED>
V4C_DEVICE void rms_norm(const float* x, const float* weight, float eps, float* y) {
  const int64_t row = blockIdx.x;
  const float factor = inverse_rms<D, 256>(x + row * D, eps);
  for (int d = threadIdx.x; d < D; d += 256) y[row * D + d] = x[row * D + d] * factor * (WEIGHTED ? weight[d] : 1.0f);
}

// Norm and rotation of the queries of a token, a warp per head, and of its key-value row by the warp behind the last.
// Grid (tokens, ceil((HEADS + 1) / 4)), 128 threads.
template <int HEADS, int C, int HALF>
V4C_DEVICE void rotary_query_kv(const float* q, const float* kv, const float* kv_norm, const int64_t* positions,
                                const float* inv_freq, int64_t s, float q_eps, float kv_eps, float* q_out,
                                float* kv_out) {
  using H = Dims<C>;
  const int head = blockIdx.y * 4 + warp();
  if (head > HEADS) return;
  const int64_t token = blockIdx.x;
  const bool key = head == HEADS;
  const int64_t at = key ? token * C : (token * HEADS + head) * C;
  float row[H::PER], squares = 0;
  H::load((key ? kv : q) + at, row);
#pragma unroll
  for (int i = 0; i < H::PER; ++i) squares = fmaf(row[i], row[i], squares);
  const float factor = rsqrtf(warp_sum(squares) / C + (key ? kv_eps : q_eps));
#pragma unroll
  for (int c = 0; c < H::CHUNKS; ++c)
#pragma unroll
    for (int v = 0; v < H::V; ++v) {
      const int d = H::first(c) + v;
      row[c * H::V + v] *= factor * (key && d < C ? kv_norm[d] : 1.0f);
    }
  rotate_held<C, HALF>(row, positions[token / s] + token % s, inv_freq, 1.0f);
  H::store((key ? kv_out : q_out) + at, row);
}

// Grid (ceil(n / 256)).
V4C_DEVICE void swiglu(const float* gate, const float* up, float limit, int64_t n, float* y) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i < n) y[i] = clamped_swiglu(gate[i], up[i], limit);
}

// A token's TOP_K experts by score + bias, highest first, equal ones by the smaller index, and their weights. A warp per
// token; grid (ceil(tokens / 4)), 128 threads.
template <int EXPERTS, int TOP_K>
V4C_DEVICE void topk_route(const float* logits, const float* bias, int64_t tokens, float scaling, float* weights,
                           int64_t* indices) {
  constexpr int PER = (EXPERTS + WARP - 1) / WARP;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * 4 + warp();
  if (token >= tokens) return;
  float keys[PER], total = 0, mine = 0;
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int e = i * WARP + lane();
    keys[i] = e < EXPERTS ? expert_score(logits[token * EXPERTS + e]) + bias[e] : -INF;
  }
  for (int choice = 0; choice < TOP_K; ++choice) {
    float best = -INF;
    int at = EXPERTS;
#pragma unroll
    for (int i = 0; i < PER; ++i)
      if (keys[i] > best || (keys[i] == best && i * WARP + lane() < at)) best = keys[i], at = i * WARP + lane();
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, best, step);
      const int other_at = __shfl_xor_sync(0xffffffffu, at, step);
      if (other > best || (other == best && other_at < at)) best = other, at = other_at;
    }
    if (at >= EXPERTS) at = 0;  // only where scores are NaN: an index must stay one
#pragma unroll
    for (int i = 0; i < PER; ++i)
      if (i * WARP + lane() == at) keys[i] = -INF;
    const float score = expert_score(logits[token * EXPERTS + at]);
    total += score;
    if (choice % WARP == lane()) mine = score;
    if (lane() == 0) indices[token * TOP_K + choice] = at, weights[token * TOP_K + choice] = score;
  }
  __syncwarp();
  if constexpr (TOP_K <= WARP) {
    if (lane() < TOP_K) weights[token * TOP_K + lane()] = mine / (total + 1e-20f) * scaling;
  } else if (lane() == 0) {
    for (int choice = 0; choice < TOP_K; ++choice) weights[token * TOP_K + choice] *= scaling / (total + 1e-20f);
  }
}

// Experts from a table of token ids. One thread per token; grid (ceil(tokens / 128)).
template <int EXPERTS, int TOP_K>
V4C_DEVICE void hash_route(const float* logits, const int64_t* ids, const int64_t* table, int64_t tokens,
                           float scaling, float* weights, int64_t* indices) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (token >= tokens) return;
  float total = 1e-20f;
  for (int choice = 0; choice < TOP_K; ++choice) {
    const int64_t expert = table[ids[token] * TOP_K + choice];
    indices[token * TOP_K + choice] = expert;
    total += expert_score(logits[token * EXPERTS + expert]);
  }
  for (int choice = 0; choice < TOP_K; ++choice)
    weights[token * TOP_K + choice] =
        expert_score(logits[token * EXPERTS + indices[token * TOP_K + choice]]) / total * scaling;
}

// The weights of chosen experts from their rows of the router alone. Grid (tokens), TOP_K warps.
template <int D, int TOP_K>
V4C_DEVICE void hash_router(const float* x, const float* router, const int64_t* indices, float scaling,
                            float* weights) {
  __shared__ float scores[TOP_K];
  const int64_t token = blockIdx.x;
  for (int choice = warp(); choice < TOP_K; choice += blockDim.x / WARP) {
    const float* const rows[1] = {x + token * D};
    const float* const matrix[1] = {router + indices[token * TOP_K + choice] * D};
    float sums[1][1];
    dot_rows<float, D, 1, 1, false>(rows, nullptr, matrix, sums);
    if (lane() == 0) scores[choice] = expert_score(sums[0][0]);
  }
  __syncthreads();
  float total = 1e-20f;
  for (int choice = 0; choice < TOP_K; ++choice) total += scores[choice];
  for (int choice = threadIdx.x; choice < TOP_K; choice += blockDim.x)
    weights[token * TOP_K + choice] = scores[choice] / total * scaling;
}

// Sum of two tensors. Grid (ceil(n / 256)).
V4C_DEVICE void add(const float* a, const float* b, int64_t n, float* y) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i < n) y[i] = a[i] + b[i];
}

}  // namespace v4c
