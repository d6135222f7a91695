// Products with few rows: bound by reading the weight, so every weight is read once for all rows, 16 bytes a lane
// (8 or 4 of coded ones: more would be the inputs of too many lines for one load).
//
// y[m, n] = sum over k of x[m, k] w[n, k]. A warp computes OUTS outputs for up to ROWS rows; lanes share k.

namespace v4c {

// Widths of the tensors that the outputs of a merged projection go to.
template <int... N>
struct Widths {
  static constexpr int TOTAL = (0 + ... + N);

  // Where output n of a row goes: `outputs` are the tensors in order.
  template <class... Out>
  static V4C_DEVICE float* at(int64_t row, int n, Out... outputs) {
    float* found = nullptr;
    int first = 0;
    ((found = n >= first && n < first + N ? outputs + row * N + (n - first) : found, first += N), ...);
    return found;
  }
};

// 1 / sqrt(mean(x^2) + eps) of rows of K numbers, for every thread of the block.
template <int K, int THREADS>
V4C_DEVICE float inverse_rms(const float* row, float eps) {
  float sum = 0;
  for (int k = threadIdx.x; k < K; k += THREADS) sum += row[k] * row[k];
  return rsqrtf(block_sum<THREADS>(sum) / K + eps);
}

// Partial sums over k of OUTS x ROWS products, complete in every lane.
template <class W, int K, int ROWS, int OUTS, bool NORM>
V4C_DEVICE void dot_rows(const float* const (&x)[ROWS], const float* norm,
                         const typename Rows<W, K>::Stored* const (&w)[OUTS], float (&sums)[ROWS][OUTS]) {
  using R = Rows<W, K>;
#pragma unroll
  for (int m = 0; m < ROWS; ++m)
#pragma unroll
    for (int o = 0; o < OUTS; ++o) sums[m][o] = 0;
#pragma unroll(ROWS * OUTS > (R::CODED ? 4 : 8) ? 1 : R::CODED ? 4 : 2)
  for (int k = lane() * R::STEP; k < K; k += WARP * R::STEP) {
    float weights[OUTS][R::STEP], scales[OUTS];
#pragma unroll
    for (int o = 0; o < OUTS; ++o) R::load(w[o], k, weights[o]), scales[o] = R::scale(w[o], k);
    if constexpr (NORM) {
#pragma unroll
      for (int i = 0; i < R::STEP; ++i)
#pragma unroll
        for (int o = 0; o < OUTS; ++o) weights[o][i] *= norm[k + i];
    }
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
      float values[R::STEP];
      if constexpr (R::STEP % 4 == 0) {
#pragma unroll
        for (int i = 0; i < R::STEP; i += 4) Format<float>::load(x[m] + k + i, values + i);
      } else {
        values[0] = x[m][k];
      }
#pragma unroll
      for (int o = 0; o < OUTS; ++o) {
        if constexpr (R::CODED) {
          float part = 0;
#pragma unroll
          for (int i = 0; i < R::STEP; ++i) part = fmaf(values[i], weights[o][i], part);
          sums[m][o] = fmaf(part * W::FACTOR, scales[o], sums[m][o]);
        } else {
#pragma unroll
          for (int i = 0; i < R::STEP; ++i) sums[m][o] = fmaf(values[i], weights[o][i], sums[m][o]);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < ROWS; ++m)
#pragma unroll
    for (int o = 0; o < OUTS; ++o) sums[m][o] = warp_sum(sums[m][o]);
}

// Rows of x [rows, GROUPS, K] with w [GROUPS, N, K]; grid (ceil(N / (warps * OUTS)), GROUPS), 128 threads.
template <class W, int K, int ROWS, int OUTS, bool NORM, int GROUPS, class Sizes, class... Out>
V4C_DEVICE void gemv(const float* x, const float* norm, const typename Rows<W, K>::Stored* w, int64_t rows, float eps,
                     Out... outputs) {
  using R = Rows<W, K>;
  constexpr int N = Sizes::TOTAL, WARPS = 4;
  const int group = blockIdx.y;
  const float* x_rows[ROWS];
  float factors[ROWS];
#pragma unroll
  for (int m = 0; m < ROWS; ++m) {
    x_rows[m] = x + (smaller(m, rows - 1) * GROUPS + group) * K;
    factors[m] = 1;
    if constexpr (NORM) factors[m] = inverse_rms<K, WARPS * WARP>(x_rows[m], eps);
  }
  const int first = (blockIdx.x * WARPS + warp()) * OUTS;
  if (first >= N) return;
  const typename R::Stored* w_rows[OUTS];
#pragma unroll
  for (int o = 0; o < OUTS; ++o)
    w_rows[o] = w + (static_cast<int64_t>(group) * N + smaller(first + o, N - 1)) * R::SIZE;
  float sums[ROWS][OUTS];
  dot_rows<W, K, ROWS, OUTS, NORM>(x_rows, norm, w_rows, sums);
#pragma unroll
  for (int m = 0; m < ROWS; ++m)
#pragma unroll
    for (int o = 0; o < OUTS; ++o)
      if (lane() == (m * OUTS + o) % WARP && m < rows && first + o < N)
        *Sizes::at(m * GROUPS + group, first + o, outputs...) = sums[m][o] * factors[m];
}

}  // namespace v4c
