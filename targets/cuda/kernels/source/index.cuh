// The lightning indexer: scores of compressed rows, and the top_k of them by radix selection.

namespace v4c {

constexpr int INDEX_ROWS = 64;  // compressed rows of one block

// Rotated queries, float32 or rounded to bfloat16: out = trailing rope of x. Grid (tokens, ceil(HEADS / 4)), 128 threads,
// a warp per head.
template <class T, int HEADS, int C, int HALF>
V4C_DEVICE void rotate_heads(const float* x, const int64_t* positions, const float* inv_freq, int64_t s, float sign,
                             T* out) {
  using H = Dims<C>;
  const int head = blockIdx.y * 4 + warp();
  if (head >= HEADS) return;
  const int64_t token = blockIdx.x;
  float row[H::PER];
  H::load(x + (token * HEADS + head) * C, row);
  rotate_held<C, HALF>(row, positions[token / s] + token % s, inv_freq, sign);
  H::store(out + (token * HEADS + head) * C, row);
}

// How many compressed rows are ready for a token.
V4C_DEVICE int64_t ready_rows(int64_t token, int64_t s, int64_t n_rows, int64_t ratio, const int64_t* positions,
                              const int64_t* lengths) {
  const int64_t start = positions[token / s];
  return smaller(n_rows, smaller(start + token % s + 1, start + lengths[token / s]) / ratio);
}

// scores[token - first][n] = sum over heads of weight relu(q_h . row_n), of ready rows. Grid (ceil(n_rows / 64), tokens of
// this call), 256 threads, each four rows and four heads of a 64 x 64 tile.
template <int HEADS, int C, int RATIO>
V4C_DEVICE void index_scores(const float* q, const float* weights, const float* rows, const int64_t* positions,
                             const int64_t* lengths, int64_t first, int64_t tokens, int64_t s, int64_t n_rows,
                             float* scores) {
  using T = TileF32;
  const int64_t token = first + blockIdx.y, n0 = static_cast<int64_t>(blockIdx.x) * INDEX_ROWS;
  if (token >= tokens) return;
  const int64_t ready = ready_rows(token, s, n_rows, RATIO, positions, lengths);
  if (n0 >= ready) return;
  const float* own = rows + token / s * n_rows * C;
  float totals[4] = {0, 0, 0, 0};
  for (int h0 = 0; h0 < HEADS; h0 += T::BN) {
    float sums[1][4][4];
    clear(sums);
    auto a_row = [&](int r) -> const float* { return n0 + r < ready ? own + (n0 + r) * C : nullptr; };
    auto b_row = [&](int h) -> const float* { return h0 + h < HEADS ? q + (token * HEADS + h0 + h) * C : nullptr; };
    T::product<float, C>(a_row, b_row, sums);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int head = h0 + T::column() + j;
      const float weight = head < HEADS ? weights[token * HEADS + head] : 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) totals[i] = fmaf(weight, fmaxf(sums[0][i][j], 0.0f), totals[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) totals[i] += __shfl_xor_sync(0xffffffffu, totals[i], step);
    const int64_t n = n0 + T::row() + i;
    if (threadIdx.x % 16 == 0 && n < ready) scores[blockIdx.y * n_rows + n] = totals[i];
  }
}

// A float as a number that orders as it does; -0 and 0 are equal.
V4C_DEVICE unsigned ordered(float value) {
  const unsigned bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Sums of the values of the threads before this one; `total` of all. 1024 threads.
V4C_DEVICE int sum_before(int value, int* parts, int* total) {
  int inclusive = value;
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, inclusive, step);
    if (lane() >= step) inclusive += other;
  }
  __syncthreads();
  if (lane() == WARP - 1) parts[warp()] = inclusive;
  __syncthreads();
  int before = 0, all = 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if (i < warp()) before += parts[i];
    all += parts[i];
  }
  *total = all;
  return before + inclusive - value;
}

// The K best ready rows, best first, equal scores by the smaller row, -1 behind the last; a block of 1024 per token.
//
// Four passes over the scores find, eight bits at a time, the K-th highest; a fifth collects what is above it, and of
// what equals it the first rows. The chosen are sorted in shared memory.
template <int K, int RATIO>
V4C_DEVICE void index_top_k(const float* scores, const int64_t* positions, const int64_t* lengths, int64_t first,
                            int64_t tokens, int64_t s, int64_t n_rows, int64_t* indices) {
  constexpr int THREADS = 1024;
  constexpr int SIZE = K <= 64 ? 64 : K <= 128 ? 128 : K <= 256 ? 256 : K <= 512 ? 512 : K <= 1024 ? 1024 : 2048;
  static_assert(K <= 2048, "top_k above 2048");
  __shared__ unsigned long long chosen[SIZE];
  __shared__ int histogram[256], parts[32], state[2];
  const int64_t token = first + blockIdx.x;
  if (token >= tokens) return;
  scores += blockIdx.x * n_rows;
  indices += token * K;
  const int64_t n = ready_rows(token, s, n_rows, RATIO, positions, lengths);
  const int wanted = static_cast<int>(smaller(K, larger(n, 0)));

  unsigned prefix = 0;
  int left = wanted;  // of those that begin with `prefix`
  if (n > K) {
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int i = threadIdx.x; i < 256; i += THREADS) histogram[i] = 0;
      __syncthreads();
      for (int64_t i = threadIdx.x; i < n; i += THREADS) {
        const unsigned key = ordered(scores[i]);
        if (shift == 24 || key >> (shift + 8) == prefix) atomicAdd(&histogram[key >> shift & 255], 1);
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        int digit = 255, rest = left;
        while (digit > 0 && histogram[digit] < rest) rest -= histogram[digit--];
        state[0] = digit, state[1] = rest;
      }
      __syncthreads();
      prefix = prefix << 8 | static_cast<unsigned>(state[0]);
      left = state[1];
      __syncthreads();
    }
  }

  // Places in `chosen` from counts before this thread's row: above the threshold first, then those equal to it.
  int above = 0, equal = 0;
  const int greater = wanted - left;
  for (int64_t i0 = 0; i0 < n; i0 += THREADS) {
    const int64_t i = i0 + threadIdx.x;
    const unsigned key = i < n ? ordered(scores[i]) : 0;
    const bool is_above = i < n && (n <= K || key > prefix), is_equal = i < n && n > K && key == prefix;
    int all;
    const int packed = sum_before(is_above | is_equal << 16, parts, &all);
    const int place = is_above ? above + (packed & 0xffff) : greater + equal + (packed >> 16);
    if (is_above || (is_equal && place < wanted))
      chosen[place] = static_cast<unsigned long long>(key) << 32 | (0xffffffffu - static_cast<unsigned>(i));
    above += all & 0xffff, equal += all >> 16;
  }
  for (int i = wanted + threadIdx.x; i < SIZE; i += THREADS) chosen[i] = 0;
  __syncthreads();
  for (int run = 2; run <= SIZE; run *= 2)
    for (int step = run / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < SIZE / 2; i += THREADS) {
        const int low = i / step * step * 2 + i % step, high = low + step;
        const unsigned long long a = chosen[low], b = chosen[high];
        if ((low & run) == 0 ? a < b : a > b) chosen[low] = b, chosen[high] = a;
      }
      __syncthreads();
    }
  for (int i = threadIdx.x; i < K; i += THREADS)
    indices[i] = i < wanted ? static_cast<int64_t>(0xffffffffu - static_cast<unsigned>(chosen[i])) : -1;
}

}  // namespace v4c
