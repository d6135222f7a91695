// The KV compressor: every completed window becomes one row; then the rings take this call's projections.

namespace v4c {

// One of two compressors that a launch may serve.
struct Compressor {
  const float *kv, *gate, *bias, *norm, *ring_kv, *ring_gate;
  float* rows;
  int64_t n_rows;
};

// Pools window `w` of `batch`. Z == C: windows stand alone, ring of M; Z == 2 C: with the window before, ring of 2 M.
template <int C, int Z, int M, int HALF, int THREADS>
V4C_DEVICE void pool_window(const Compressor& of, const float* inv_freq, int64_t batch, int64_t w, int64_t start,
                            int64_t s, float eps) {
  constexpr int Q = Z == C ? M : 2 * M, SLOTS = Z == C ? M : 2 * M, COLUMNS = (C + THREADS - 1) / THREADS;
  __shared__ float pooled[C];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    const int c = i * THREADS + threadIdx.x;
    if (c >= C) continue;
    // Slot k: its token, and the column of its projections.
    auto read = [&](const float* fresh, const float* ring, int slot) {
      const int64_t t = (Z == C ? w : w - 1) * M + slot;
      const int column = Z == C || slot < M ? c : C + c;
      return t >= start ? fresh[(batch * s + t - start) * Z + column] : ring[(batch * Q + t % Q) * Z + column];
    };
    const int from = Z != C && w == 0 ? M : 0;
    float highest = -INF, under = 0, sum = 0;
    for (int slot = from; slot < SLOTS; ++slot) {
      const int column = Z == C || slot < M ? c : C + c;
      const float gate = read(of.gate, of.ring_gate, slot) + of.bias[slot % M * Z + column];
      const float higher = fmaxf(highest, gate), shrink = expf(highest - higher), weight = expf(gate - higher);
      under = under * shrink + weight;
      sum = sum * shrink + weight * read(of.kv, of.ring_kv, slot);
      highest = higher;
    }
    pooled[c] = sum / under;
    squares += pooled[c] * pooled[c];
  }
  const float factor = rsqrtf(block_sum<THREADS>(squares) / C + eps);  // its barriers publish `pooled`
  float* row = of.rows + (batch * of.n_rows + w) * C;
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    const int c = i * THREADS + threadIdx.x;
    if (c >= C) continue;
    float value = pooled[c] * factor * of.norm[c];
    if (c >= C - 2 * HALF) {
      const int pair = (c - (C - 2 * HALF)) / 2, mate = c ^ 1;
      const float other = pooled[mate] * factor * of.norm[mate];
      float sine, cosine;
      sincosf(static_cast<float>(w * M) * inv_freq[pair], &sine, &cosine);
      value = c % 2 == 0 ? value * cosine - other * sine : value * cosine + other * sine;
    }
    row[c] = value;
  }
}

// Grid (windows a call of s tokens may complete, B), THREADS threads.
template <int C, int Z, int M, int HALF, int THREADS>
V4C_DEVICE void compress(const float* kv, const float* gate, const float* bias, const float* norm,
                         const float* inv_freq, const float* ring_kv, const float* ring_gate, float* rows,
                         const int64_t* positions, const int64_t* lengths, int64_t s, int64_t n_rows, float eps) {
  const int64_t batch = blockIdx.y, start = positions[batch], w = start / M + blockIdx.x;
  if (w >= (start + lengths[batch]) / M || w >= n_rows) return;
  const Compressor of = {kv, gate, bias, norm, ring_kv, ring_gate, rows, n_rows};
  pool_window<C, Z, M, HALF, THREADS>(of, inv_freq, batch, w, start, s, eps);
}

// The last Q live rows of this call into both rings. Grid (B * S), 128 threads.
template <int Z, int Q>
V4C_DEVICE void write_rings(const float* kv, const float* gate, float* ring_kv, float* ring_gate,
                            const int64_t* positions, const int64_t* lengths, int64_t s) {
  const int64_t batch = blockIdx.x / s, j = blockIdx.x % s;
  if (j >= lengths[batch] || j < lengths[batch] - Q) return;
  const int64_t from = (batch * s + j) * Z, to = (batch * Q + (positions[batch] + j) % Q) * Z;
  for (int z = threadIdx.x; z < Z; z += 128) ring_kv[to + z] = kv[from + z], ring_gate[to + z] = gate[from + z];
}

}  // namespace v4c
