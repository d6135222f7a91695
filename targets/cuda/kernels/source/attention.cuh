// Attention with one row per token that is key and value for all heads, over the window and compressed rows.
//
// Here in float32, on the ordinary units; on tensor cores in attention_tiles.cuh. A warp owns two heads: its lanes hold
// their queries and sums, split by dims, so a key is read into registers once and serves score and sum of both. Keys
// come through shared memory, eight at a time, one tile ahead. With few tokens the keys are split over blocks, and a
// second launch joins the parts.

namespace v4c {

// Dims of a row in chunks of V consecutive ones per lane; every lane holds PER of them. Pairs that rotate stay together.
template <int C>
struct Dims {
  static constexpr int V = C % 128 == 0 ? 4 : 2;
  static constexpr int CHUNKS = (C + WARP * V - 1) / (WARP * V);
  static constexpr int PER = CHUNKS * V;

  static V4C_DEVICE int first(int chunk) { return (chunk * WARP + lane()) * V; }

  static V4C_DEVICE void load(const float* row, float (&to)[PER]) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int d = first(c);
      if constexpr (V == 4) {
        Format<float>::load(row + d, to + c * V);
      } else {
        float2 pair = d < C ? *reinterpret_cast<const float2*>(row + d) : make_float2(0, 0);
        to[c * V] = pair.x, to[c * V + 1] = pair.y;
      }
    }
  }
  template <class T>
  static V4C_DEVICE void store(T* row, const float (&from)[PER]) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int d = first(c);
      if (d >= C) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) row[d + v] = from[c * V + v];
    }
  }
};

// Sine and cosine by which dims d and d + 1 of C are rotated at a position; 0 and 1 before the last 2 * HALF.
template <int C, int HALF>
V4C_DEVICE void angle_of(int d, int64_t position, const float* inv_freq, float* sine, float* cosine) {
  constexpr int FIRST = C - 2 * HALF;
  *sine = 0, *cosine = 1;
  if (d >= FIRST && d < C) sincosf(static_cast<float>(position) * inv_freq[(d - FIRST) / 2], sine, cosine);
}

V4C_DEVICE void rotate(float& even, float& odd, float sine, float cosine) {
  const float first = even;
  even = first * cosine - odd * sine;
  odd = odd * cosine + first * sine;
}

// Rotate the pairs of the last 2 * HALF dims of a row, held as `Dims` does, by sign * position * inv_freq.
template <int C, int HALF>
V4C_DEVICE void rotate_held(float (&row)[Dims<C>::PER], int64_t position, const float* inv_freq, float sign) {
  using H = Dims<C>;
#pragma unroll
  for (int c = 0; c < H::CHUNKS; ++c)
#pragma unroll
    for (int v = 0; v < H::V; v += 2) {
      float sine, cosine;
      angle_of<C, HALF>(H::first(c) + v, position, inv_freq, &sine, &cosine);
      rotate(row[c * H::V + v], row[c * H::V + v + 1], sign * sine, cosine);
    }
}

// Where a token's keys lie: `raw` rows of its window first, then compressed ones.
template <class T>
struct Keys {
  const T *window, *fresh, *rows;  // this row of the batch: ring [W, C], kv of this call [S, C], compressed [N, C]
  const int64_t* indices;              // the token's chosen rows, -1 none; null: all, in order
  int64_t start, first, raw, count;    // position of kv[0], of the first raw key; raw keys, and keys in all

  // Which row key n is, of the window or of the compressed ones; -1 none.
  V4C_DEVICE int64_t row(int64_t n) const {
    if (n >= count) return -1;
    if (n < raw) return first + n;
    return indices == nullptr ? n - raw : indices[n - raw];
  }
  // Where key n lies, which is that row; null for none.
  template <int C, int W>
  V4C_DEVICE const T* at(int64_t n, int64_t row) const {
    if (row < 0) return nullptr;
    if (n >= raw) return rows + row * C;
    return row < start ? window + row % W * C : fresh + (row - start) * C;
  }
};

// TOP_K: chosen rows per token, 0 for none, -1 for all that are ready, one per RATIO tokens.
template <int C, int W, int TOP_K, int RATIO, class T>
V4C_DEVICE Keys<T> keys_of(const T* kv, const T* window, const T* rows, const int64_t* indices, int64_t batch,
                           int64_t j, int64_t s, int64_t n_rows, const int64_t* positions, const int64_t* lengths) {
  Keys<T> keys;
  const int64_t start = positions[batch], p = start + j;
  keys.window = window + batch * W * C;
  keys.fresh = kv + batch * s * C;
  keys.rows = rows + batch * n_rows * C;
  keys.indices = TOP_K > 0 ? indices + (batch * s + j) * TOP_K : nullptr;
  keys.start = start;
  keys.first = larger(0, p - W + 1);
  keys.raw = p - keys.first + 1;
  keys.count = keys.raw;
  if (TOP_K > 0) keys.count += TOP_K;
  if (TOP_K < 0) keys.count += smaller(n_rows, smaller(p + 1, start + lengths[batch]) / RATIO);
  if (j >= lengths[batch]) keys.raw = 1, keys.count = 1, keys.first = p;  // padding: its own row, to stay defined
  return keys;
}

constexpr int KEY_TILE = 8, HEADS_PER_WARP = 2;

// Grid (B * S, ceil(HEADS / (2 WARPS)), splits), WARPS * 32 threads. PARTS: `out` is partial sums [tokens, splits,
// HEADS, C], and `peaks` [.., 2] their maximum and denominator; otherwise the output is complete.
template <int HEADS, int C, int W, int TOP_K, int RATIO, int HALF, int WARPS, bool PARTS>
V4C_DEVICE void attention(const float* q, const float* kv, const float* window, const float* rows,
                          const int64_t* indices, const float* sinks, const int64_t* positions,
                          const int64_t* lengths, const float* inv_freq, int64_t s, int64_t n_rows, float scale,
                          float* out, float* peaks) {
  using H = Dims<C>;
  __shared__ __align__(16) float tiles[2][KEY_TILE][C];
  __shared__ int present[2][KEY_TILE];
  const int64_t token = blockIdx.x, batch = token / s, j = token % s;
  const auto keys = keys_of<C, W, TOP_K, RATIO>(kv, window, rows, indices, batch, j, s, n_rows, positions, lengths);
  const int64_t tiles_all = (keys.count + KEY_TILE - 1) / KEY_TILE;
  const int64_t per_split = (tiles_all + gridDim.z - 1) / gridDim.z;
  const int64_t begin = blockIdx.z * per_split, end = smaller(tiles_all, begin + per_split);

  float query[HEADS_PER_WARP][H::PER], sums[HEADS_PER_WARP][H::PER], top[HEADS_PER_WARP], under[HEADS_PER_WARP];
  const int head0 = (blockIdx.y * WARPS + warp()) * HEADS_PER_WARP;
#pragma unroll
  for (int h = 0; h < HEADS_PER_WARP; ++h) {
    const int head = head0 + h < HEADS ? head0 + h : HEADS - 1;
    H::load(q + (token * HEADS + head) * C, query[h]);
    top[h] = -INF, under[h] = 0;
#pragma unroll
    for (int i = 0; i < H::PER; ++i) sums[h][i] = 0, query[h][i] *= scale;
  }

  constexpr int COPIES = KEY_TILE * C / 4;  // of 16 bytes
  auto fetch = [&](int64_t tile) {
    const int stage = (tile - begin) % 2;
    for (int i = threadIdx.x; i < COPIES; i += WARPS * WARP) {
      const int n = i / (C / 4), part = i % (C / 4) * 4;
      const float* from = keys.template at<C, W>(tile * KEY_TILE + n, keys.row(tile * KEY_TILE + n));
      copy_async(&tiles[stage][n][part], from == nullptr ? kv : from + part, from != nullptr);
      if (part == 0) present[stage][n] = from != nullptr;
    }
    commit_copies();
  };

  if (begin < end) fetch(begin);
  for (int64_t tile = begin; tile < end; ++tile) {
    if (tile + 1 < end) fetch(tile + 1);
    else commit_copies();
    wait_copies<1>();
    __syncthreads();
    const int stage = (tile - begin) % 2;
    float scores[HEADS_PER_WARP][KEY_TILE];
#pragma unroll
    for (int n = 0; n < KEY_TILE; ++n) {
      float key[H::PER];
      H::load(tiles[stage][n], key);
#pragma unroll
      for (int h = 0; h < HEADS_PER_WARP; ++h) {
        float dot = 0;
#pragma unroll
        for (int i = 0; i < H::PER; ++i) dot = fmaf(query[h][i], key[i], dot);
        dot = warp_sum(dot);
        scores[h][n] = present[stage][n] ? dot : -INF;
      }
    }
#pragma unroll
    for (int h = 0; h < HEADS_PER_WARP; ++h) {
      float highest = top[h];
#pragma unroll
      for (int n = 0; n < KEY_TILE; ++n) highest = fmaxf(highest, scores[h][n]);
      const float shrink = expf(top[h] - highest);
      top[h] = highest, under[h] *= shrink;
#pragma unroll
      for (int i = 0; i < H::PER; ++i) sums[h][i] *= shrink;
#pragma unroll
      for (int n = 0; n < KEY_TILE; ++n) {
        scores[h][n] = present[stage][n] ? expf(scores[h][n] - highest) : 0;
        under[h] += scores[h][n];
      }
    }
#pragma unroll
    for (int n = 0; n < KEY_TILE; ++n) {
      float key[H::PER];
      H::load(tiles[stage][n], key);
#pragma unroll
      for (int h = 0; h < HEADS_PER_WARP; ++h)
#pragma unroll
        for (int i = 0; i < H::PER; ++i) sums[h][i] = fmaf(scores[h][n], key[i], sums[h][i]);
    }
    __syncthreads();
  }

#pragma unroll
  for (int h = 0; h < HEADS_PER_WARP; ++h) {
    const int head = head0 + h;
    if (head >= HEADS) continue;
    if constexpr (PARTS) {
      const int64_t part = (token * gridDim.z + blockIdx.z) * HEADS + head;
      if (begin < end) H::store(out + part * C, sums[h]);
      if (lane() == 0) peaks[part * 2] = top[h], peaks[part * 2 + 1] = under[h];
    } else {
      const float highest = fmaxf(top[h], sinks[head]);
      const float factor = expf(top[h] - highest) / (under[h] * expf(top[h] - highest) + expf(sinks[head] - highest));
#pragma unroll
      for (int i = 0; i < H::PER; ++i) sums[h][i] *= factor;
      if constexpr (HALF > 0) rotate_held<C, HALF>(sums[h], positions[batch] + j, inv_freq, -1.0f);
      H::store(out + (token * HEADS + head) * C, sums[h]);
    }
  }
}

// Row j of this call into the ring, if it is live and none of the last W overwrites it.
template <int C, int W>
V4C_DEVICE void write_ring(const float* kv, float* window, int64_t batch, int64_t j, int64_t s,
                           const int64_t* positions, const int64_t* lengths) {
  if (j >= lengths[batch] || j < lengths[batch] - W) return;
  float* slot = window + (batch * W + (positions[batch] + j) % W) * C;
  const float* row = kv + (batch * s + j) * C;
  for (int d = threadIdx.x; d < C; d += blockDim.x) slot[d] = row[d];
}

// Grid (B * S): the ring, after everything has been read.
template <int C, int W>
V4C_DEVICE void write_window(const float* kv, float* window, const int64_t* positions, const int64_t* lengths,
                             int64_t s) {
  write_ring<C, W>(kv, window, blockIdx.x / s, blockIdx.x % s, s, positions, lengths);
}

// Joins the parts of a head, and writes the ring. Grid (HEADS + 1, tokens), 128 threads, each four dims at a time.
template <int HEADS, int C, int W, int HALF, int SPLITS>
V4C_DEVICE void join_attention(const float* parts, const float* peaks, const float* kv, float* window,
                               const float* sinks, const int64_t* positions, const int64_t* lengths,
                               const float* inv_freq, int64_t s, float* out) {
  __shared__ float factors[SPLITS];
  const int64_t token = blockIdx.y, batch = token / s, j = token % s;
  const int head = blockIdx.x;
  if (head == HEADS) {
    write_ring<C, W>(kv, window, batch, j, s, positions, lengths);
    return;
  }
  parts += (token * SPLITS * HEADS + head) * C;
  peaks += (token * SPLITS * HEADS + head) * 2;
  // Every warp for itself: the highest score, the last split that saw a key, and then the denominator.
  float highest = sinks[head], used = 0, under = 0;
  for (int split = lane(); split < SPLITS; split += WARP)
    if (peaks[split * HEADS * 2 + 1] > 0) highest = fmaxf(highest, peaks[split * HEADS * 2]), used = split + 1;
  highest = warp_max(highest), used = warp_max(used);
  for (int split = lane(); split < SPLITS; split += WARP) {
    const float factor = expf(peaks[split * HEADS * 2] - highest);
    if (warp() == 0) factors[split] = factor;
    under = fmaf(factor, peaks[split * HEADS * 2 + 1], under);
  }
  under = warp_sum(under) + expf(sinks[head] - highest);
  __syncthreads();
  for (int d = threadIdx.x * 4; d < C; d += 4 * 128) {
    float sums[4] = {0, 0, 0, 0};
#pragma unroll 8
    for (int split = 0; split < static_cast<int>(used); ++split) {
      float part[4];
      Format<float>::load(parts + static_cast<int64_t>(split) * HEADS * C + d, part);
#pragma unroll
      for (int v = 0; v < 4; ++v) sums[v] = fmaf(factors[split], part[v], sums[v]);
    }
#pragma unroll
    for (int v = 0; v < 4; ++v) sums[v] /= under;
    if constexpr (HALF > 0) {
#pragma unroll
      for (int v = 0; v < 4; v += 2) {
        float sine, cosine;
        angle_of<C, HALF>(d + v, positions[batch] + j, inv_freq, &sine, &cosine);
        rotate(sums[v], sums[v + 1], -sine, cosine);
      }
    }
    *reinterpret_cast<float4*>(out + (token * HEADS + head) * C + d) = make_float4(sums[0], sums[1], sums[2], sums[3]);
  }
}

}  // namespace v4c
