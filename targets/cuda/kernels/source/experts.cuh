// Routed experts and the shared one. A pair is a token with one of its experts: pair = token * TOP_K + choice.
//
// Few tokens: one warp per output, straight from the experts' matrices. Many: pairs are sorted by expert, and each
// expert's run is cut into tiles of one product. Sums over a token's experts are taken in their order, never by atomics,
// so a token's result does not depend on its neighbours.

namespace v4c {

// hidden[pair or token] = swiglu(gate_up x). Grid (ceil(F / 4), tokens * PER_TOKEN), 128 threads. Of the shared expert
// (PER_TOKEN 1, `indices` null) the one matrix serves every token.
template <class W, int D, int F, int PER_TOKEN>
V4C_DEVICE void expert_hidden_few(const float* x, const int64_t* indices,
                                  const typename Rows<W, D>::Stored* gate_up, float limit, float* hidden) {
  using R = Rows<W, D>;
  const int64_t pair = blockIdx.y;
  const int f = blockIdx.x * 4 + warp();
  const int64_t expert = indices == nullptr ? 0 : indices[pair];
  if (f >= F || expert < 0) return;
  const float* const rows[1] = {x + pair / PER_TOKEN * D};
  const typename R::Stored* first = gate_up + expert * 2 * F * R::SIZE;
  const typename R::Stored* const weights[2] = {
      first + static_cast<int64_t>(f) * R::SIZE, first + static_cast<int64_t>(F + f) * R::SIZE};
  float sums[1][2];
  dot_rows<W, D, 1, 2, false>(rows, nullptr, weights, sums);
  if (lane() == 0) hidden[pair * F + f] = clamped_swiglu(sums[0][0], sums[0][1], limit);
}

// y = sum over a token's pairs of weight * down hidden, plus the shared expert's, stored as S. Grid (ceil(D / 4), tokens).
template <class W, class S, int D, int F, int TOP_K, int SHARED>
V4C_DEVICE void expert_outputs_few(const float* hidden, const float* shared_hidden, const float* weights,
                                   const int64_t* indices, const typename Rows<W, F>::Stored* down,
                                   const typename Rows<S, SHARED>::Stored* shared_down, float* y) {
  const int64_t token = blockIdx.y;
  const int d = blockIdx.x * 4 + warp();
  if (d >= D) return;
  float total = 0;
  for (int choice = 0; choice < TOP_K; ++choice) {
    const int64_t pair = token * TOP_K + choice, expert = indices[pair];
    if (expert < 0) continue;
    const float* const rows[1] = {hidden + pair * F};
    const typename Rows<W, F>::Stored* const matrix[1] = {down + (expert * D + d) * Rows<W, F>::SIZE};
    float sums[1][1];
    dot_rows<W, F, 1, 1, false>(rows, nullptr, matrix, sums);
    total = fmaf(weights[pair], sums[0][0], total);
  }
  if constexpr (SHARED > 0) {
    const float* const rows[1] = {shared_hidden + token * SHARED};
    const typename Rows<S, SHARED>::Stored* const matrix[1] = {
        shared_down + static_cast<int64_t>(d) * Rows<S, SHARED>::SIZE};
    float sums[1][1];
    dot_rows<S, SHARED, 1, 1, false>(rows, nullptr, matrix, sums);
    total += sums[0][0];
  }
  if (lane() == 0) y[token * D + d] = total;
}

// Pairs by expert, in their order within one; and the tiles of BM pairs that cover each expert's run. One block of 1024.
// order [pairs]; tiles [pairs / BM + EXPERTS, 3]: expert, first and last place in `order`; expert -1 where unused.
template <int EXPERTS, int BM>
V4C_DEVICE void sort_pairs(const int64_t* indices, int64_t pairs, int* order, int* tiles) {
  __shared__ int counts[EXPERTS + 1], starts[EXPERTS + 1], first_tile[EXPERTS + 1];
  for (int e = threadIdx.x; e <= EXPERTS; e += 1024) counts[e] = 0;
  __syncthreads();
  for (int64_t p = threadIdx.x; p < pairs; p += 1024)
    if (indices[p] >= 0) atomicAdd(&counts[indices[p]], 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    int start = 0, tile = 0;
    for (int e = 0; e <= EXPERTS; ++e) {
      starts[e] = start, first_tile[e] = tile;
      start += counts[e], tile += (counts[e] + BM - 1) / BM;
    }
  }
  __syncthreads();
  for (int64_t t = first_tile[EXPERTS] + threadIdx.x; t < pairs / BM + EXPERTS; t += 1024) tiles[t * 3] = -1;
  for (int e = warp(); e < EXPERTS; e += 1024 / WARP) {
    for (int t = lane(); t * BM < counts[e]; t += WARP) {
      int* tile = tiles + (first_tile[e] + t) * 3;
      tile[0] = e, tile[1] = starts[e] + t * BM;
      tile[2] = static_cast<int>(smaller(starts[e] + (t + 1) * BM, starts[e] + counts[e]));
    }
    int place = starts[e];
    if (counts[e] == 0) continue;
    for (int64_t p0 = 0; p0 < pairs; p0 += WARP) {
      const int64_t p = p0 + lane();
      const bool mine = p < pairs && indices[p] == e;
      const unsigned found = __ballot_sync(0xffffffffu, mine);
      if (mine) order[place + __popc(found & ((1u << lane()) - 1))] = static_cast<int>(p);
      place += __popc(found);
    }
  }
}

// Which rows a tile of pairs covers: of sorted pairs, or of all tokens for the shared expert (`tiles` null).
struct Run {
  int64_t expert, first, last;

  static V4C_DEVICE Run of(const int* tiles, int64_t tile, int64_t rows, int size) {
    if (tiles == nullptr) return {0, tile * size, smaller(rows, (tile + 1) * size)};
    return {tiles[tile * 3], tiles[tile * 3 + 1], tiles[tile * 3 + 2]};
  }
  // The pair (or token) at row r of the tile, -1 behind the last.
  V4C_DEVICE int64_t at(const int* order, int r) const {
    if (r < 0 || first + r >= last) return -1;
    return order == nullptr ? first + r : order[first + r];
  }
};

// hidden[pair] = swiglu(gate_up x), in the products' dtype; grid (ceil(F / 64), tiles). Columns of the tile alternate
// between eight gates and the eight ups of the same outputs, so a thread holds both.
template <int BM, class W, int D, int F, int PER_TOKEN>
V4C_DEVICE void expert_hidden(const nv_bfloat16* x, const int* order, const int* tiles,
                              const typename Rows<W, D>::Stored* gate_up, int64_t rows, float limit,
                              nv_bfloat16* hidden, void* shared) {
  using T = Tile<BM, W, D>;
  using Stored = typename Rows<W, D>::Stored;
  const Run run = Run::of(tiles, blockIdx.y, rows, BM);
  if (run.expert < 0) return;
  const int f0 = blockIdx.x * (T::BN / 2);
  float sums[T::MI][T::NI][4];
  clear(sums);
  auto a_row = [&](int r) -> const nv_bfloat16* {
    const int64_t pair = run.at(order, r);
    return r < 0 ? x : pair < 0 ? nullptr : x + pair / PER_TOKEN * D;
  };
  auto b_row = [&](int r) -> const Stored* {
    const int f = f0 + r / 16 * 8 + r % 8;
    if (r < 0) return gate_up;
    return f < F ? gate_up + (run.expert * 2 * F + (r / 8 % 2 ? F + f : f)) * Rows<W, D>::SIZE : nullptr;
  };
  T::product(a_row, b_row, static_cast<char*>(shared), sums);
#pragma unroll
  for (int i = 0; i < T::MI; ++i)
#pragma unroll
    for (int v = 0; v < 4; v += 2) {
      const int64_t pair = run.at(order, T::row() + i * 16 + v / 2 * 8);
      if (pair < 0) continue;
#pragma unroll
      for (int j = 0; j < T::NI; j += 2) {
        const int column = T::column() + j * 8, f = f0 + column / 16 * 8 + column % 8;
        if (f >= F) continue;
        const float low = clamped_swiglu(sums[i][j][v], sums[i][j + 1][v], limit);
        const float high = clamped_swiglu(sums[i][j][v + 1], sums[i][j + 1][v + 1], limit);
        *reinterpret_cast<unsigned*>(hidden + pair * F + f) = bf16_pair(low, high);
      }
    }
}

// out[pair] = weight * down hidden, float32; grid (ceil(D / 128), tiles). `weights` null: 1.
template <int BM, class W, int D, int F>
V4C_DEVICE void expert_outputs(const nv_bfloat16* hidden, const int* order, const int* tiles,
                               const typename Rows<W, F>::Stored* down, const float* weights, int64_t rows, float* out,
                               void* shared) {
  using T = Tile<BM, W, F>;
  const Run run = Run::of(tiles, blockIdx.y, rows, BM);
  if (run.expert < 0) return;
  const int d0 = blockIdx.x * T::BN;
  float sums[T::MI][T::NI][4];
  clear(sums);
  auto a_row = [&](int r) -> const nv_bfloat16* {
    const int64_t pair = run.at(order, r);
    return r < 0 ? hidden : pair < 0 ? nullptr : hidden + pair * F;
  };
  auto b_row = [&](int r) -> const typename Rows<W, F>::Stored* {
    return r < 0 ? down : d0 + r < D ? down + (run.expert * D + d0 + r) * Rows<W, F>::SIZE : nullptr;
  };
  T::product(a_row, b_row, static_cast<char*>(shared), sums);
#pragma unroll
  for (int i = 0; i < T::MI; ++i)
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int64_t pair = run.at(order, T::row() + i * 16 + v / 2 * 8);
      if (pair < 0) continue;
      const float weight = weights == nullptr ? 1.0f : weights[pair];
#pragma unroll
      for (int j = 0; j < T::NI; ++j) {
        const int d = d0 + T::column() + j * 8 + v % 2;
        if (d < D) out[pair * D + d] = weight * sums[i][j][v];
      }
    }
}

// The two above in float32; a thread's four columns are two gates and their two ups.
template <class W, int D, int F, int PER_TOKEN>
V4C_DEVICE void expert_hidden_f32(const float* x, const int* order, const int* tiles,
                                  const typename Rows<W, D>::Stored* gate_up, int64_t rows, float limit,
                                  float* hidden) {
  using T = TileF32;
  const Run run = Run::of(tiles, blockIdx.y, rows, T::BM);
  if (run.expert < 0) return;
  const int f0 = blockIdx.x * (T::BN / 2);
  float sums[1][4][4];
  clear(sums);
  auto a_row = [&](int r) -> const float* {
    const int64_t pair = run.at(order, r);
    return pair < 0 ? nullptr : x + pair / PER_TOKEN * D;
  };
  auto b_row = [&](int r) -> const typename Rows<W, D>::Stored* {
    const int f = f0 + r / 4 * 2 + r % 2;
    return f < F ? gate_up + (run.expert * 2 * F + (r / 2 % 2 ? F + f : f)) * Rows<W, D>::SIZE : nullptr;
  };
  T::template product<W, D>(a_row, b_row, sums);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t pair = run.at(order, T::row() + i);
    if (pair < 0) continue;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int f = f0 + T::column() / 2 + j;
      if (f < F) hidden[pair * F + f] = clamped_swiglu(sums[0][i][j], sums[0][i][j + 2], limit);
    }
  }
}

template <class W, int D, int F>
V4C_DEVICE void expert_outputs_f32(const float* hidden, const int* order, const int* tiles,
                                   const typename Rows<W, F>::Stored* down, const float* weights, int64_t rows,
                                   float* out) {
  using T = TileF32;
  const Run run = Run::of(tiles, blockIdx.y, rows, T::BM);
  if (run.expert < 0) return;
  const int d0 = blockIdx.x * T::BN;
  float sums[1][4][4];
  clear(sums);
  auto a_row = [&](int r) -> const float* {
    const int64_t pair = run.at(order, r);
    return pair < 0 ? nullptr : hidden + pair * F;
  };
  auto b_row = [&](int r) -> const typename Rows<W, F>::Stored* {
    return d0 + r < D ? down + (run.expert * D + d0 + r) * Rows<W, F>::SIZE : nullptr;
  };
  T::template product<W, F>(a_row, b_row, sums);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t pair = run.at(order, T::row() + i);
    if (pair < 0) continue;
    const float weight = weights == nullptr ? 1.0f : weights[pair];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (d0 + T::column() + j < D) out[pair * D + d0 + T::column() + j] = weight * sums[0][i][j];
  }
}

// y[token] = sum of its pairs' outputs, plus the shared expert's where there is one. Grid (tokens), 256 threads.
template <int D, int TOP_K>
V4C_DEVICE void add_experts(const float* outputs, const int64_t* indices, const float* shared_outputs, float* y) {
  const int64_t token = blockIdx.x;
  for (int d = threadIdx.x; d < D; d += 256) {
    float total = 0;
    for (int choice = 0; choice < TOP_K; ++choice) {
      const int64_t pair = token * TOP_K + choice;
      if (indices[pair] >= 0) total += outputs[pair * D + d];
    }
    y[token * D + d] = total + (shared_outputs == nullptr ? 0.0f : shared_outputs[token * D + d]);
  }
}

}  // namespace v4c
