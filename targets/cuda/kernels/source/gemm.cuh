// Products with many rows: float32 on the ordinary units, bfloat16 on the tensor cores with copies four stages ahead.
//
// Both take their rows through functions of a row number, so that experts' rows, which lie anywhere, need no gathering.

namespace v4c {

// A [rows, K] and B [N, K] of bfloat16 in tiles of BM x 128, K 32 at a time; 256 threads as 2 x 4 warps.
template <int BM>
struct Tile {
  static constexpr int BN = 128, BK = 32, STAGES = 4, THREADS = 256;
  static constexpr int MI = BM / 32, NI = 4;  // 16 x 8 fragments of one warp: BM / 2 rows, 32 columns
  static constexpr int STAGE_BYTES = (BM + BN) * BK * 2;
  static constexpr int BYTES = STAGES * STAGE_BYTES;

  // Sixteen bytes at `chunk` of a row of 64, swizzled so that eight rows of a matrix lie in different banks.
  static V4C_DEVICE char* at(char* tile, int row, int chunk) {
    return tile + row * (BK * 2) + ((chunk ^ (row / 2 % 4)) * 16);
  }

  static V4C_DEVICE int row() { return warp() / 4 * (BM / 2) + lane() / 4; }
  static V4C_DEVICE int column() { return warp() % 4 * 32 + lane() % 4 * 2; }

  // sums += A B^T. `a_row(r)` and `b_row(n)` give rows of the tile, null where there is none.
  template <class A, class B>
  static V4C_DEVICE void product(A a_row, B b_row, int k_size, char* shared, float (&sums)[MI][NI][4]) {
    constexpr int A_LOADS = BM * 4 / THREADS, B_LOADS = BN * 4 / THREADS;
    const nv_bfloat16* a_from[A_LOADS];
    const nv_bfloat16* b_from[B_LOADS];
    const int chunk = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < A_LOADS; ++i) a_from[i] = a_row(i * (THREADS / 4) + threadIdx.x / 4);
#pragma unroll
    for (int i = 0; i < B_LOADS; ++i) b_from[i] = b_row(i * (THREADS / 4) + threadIdx.x / 4);

    auto fetch = [&](int step) {
      char* a_tile = shared + step % STAGES * STAGE_BYTES;
      char* b_tile = a_tile + BM * BK * 2;
      const int k = step * BK + chunk * 8;
#pragma unroll
      for (int i = 0; i < A_LOADS; ++i) {
        bool valid = a_from[i] != nullptr && k < k_size;
        copy_async(at(a_tile, i * (THREADS / 4) + threadIdx.x / 4, chunk), valid ? a_from[i] + k : a_row(-1), valid);
      }
#pragma unroll
      for (int i = 0; i < B_LOADS; ++i) {
        bool valid = b_from[i] != nullptr && k < k_size;
        copy_async(at(b_tile, i * (THREADS / 4) + threadIdx.x / 4, chunk), valid ? b_from[i] + k : b_row(-1), valid);
      }
    };

    const int steps = (k_size + BK - 1) / BK;
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
      if (step < steps) fetch(step);
      commit_copies();
    }
    const int a_first = warp() / 4 * (BM / 2) + lane() % 8 + lane() / 8 % 2 * 8, a_chunk = lane() / 16;
    const int b_first = warp() % 4 * 32 + lane() % 8 + lane() / 16 * 8, b_chunk = lane() / 8 % 2;
    for (int step = 0; step < steps; ++step) {
      wait_copies<STAGES - 2>();
      __syncthreads();  // the stage has arrived for all threads, and all are done with the one that is refilled
      if (step + STAGES - 1 < steps) fetch(step + STAGES - 1);
      commit_copies();
      char* a_tile = shared + step % STAGES * STAGE_BYTES;
      char* b_tile = a_tile + BM * BK * 2;
#pragma unroll
      for (int half = 0; half < BK / 16; ++half) {
        unsigned a[MI][4], b[NI / 2][4];
#pragma unroll
        for (int i = 0; i < MI; ++i) load_matrices(a[i], at(a_tile, a_first + i * 16, half * 2 + a_chunk));
#pragma unroll
        for (int j = 0; j < NI / 2; ++j) load_matrices(b[j], at(b_tile, b_first + j * 16, half * 2 + b_chunk));
#pragma unroll
        for (int i = 0; i < MI; ++i)
#pragma unroll
          for (int j = 0; j < NI; ++j) multiply(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
    wait_copies<0>();
  }
};

template <int MI, int NI, int V>
V4C_DEVICE void clear(float (&sums)[MI][NI][V]) {
#pragma unroll
  for (int i = 0; i < MI; ++i)
#pragma unroll
    for (int j = 0; j < NI; ++j)
#pragma unroll
      for (int v = 0; v < V; ++v) sums[i][j][v] = 0;
}

// float32 in tiles of 64 x 64, K 16 at a time; 256 threads, each 4 rows x 4 columns.
struct TileF32 {
  static constexpr int BM = 64, BN = 64, BK = 16, THREADS = 256;

  static V4C_DEVICE int row() { return threadIdx.x / 16 * 4; }
  static V4C_DEVICE int column() { return threadIdx.x % 16 * 4; }

  // As `Tile::product`; B may be of any weight dtype W.
  template <class W, class A, class B>
  static V4C_DEVICE void product(A a_row, B b_row, int k_size, float (&sums)[1][4][4]) {
    __shared__ __align__(16) float a_tile[BK][BM + 4], b_tile[BK][BN + 4];
    const float* a_from = a_row(threadIdx.x / 4);
    const W* b_from = b_row(threadIdx.x / 4);
    for (int k0 = 0; k0 < k_size; k0 += BK) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int k = threadIdx.x % 4 * 4 + i;
        bool inside = k0 + k < k_size;
        a_tile[k][threadIdx.x / 4] = a_from != nullptr && inside ? a_from[k0 + k] : 0;
        b_tile[k][threadIdx.x / 4] = b_from != nullptr && inside ? Format<W>::one(b_from + k0 + k) : 0;
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < BK; ++k) {
        float a[4], b[4];
        Format<float>::load(&a_tile[k][row()], a);
        Format<float>::load(&b_tile[k][column()], b);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[0][i][j] = fmaf(a[i], b[j], sums[0][i][j]);
      }
    }
  }
};

// x as the product reads it: normed where NORM, and in bfloat16 where W is. One block of 256 threads per row of K.
template <class W, int K, bool NORM>
V4C_DEVICE void prepare_rows(const float* x, const float* norm, float eps, W* out) {
  x += static_cast<int64_t>(blockIdx.x) * K;
  out += static_cast<int64_t>(blockIdx.x) * K;
  float factor = 1;
  if constexpr (NORM) factor = inverse_rms<K, 256>(x, eps);
  if constexpr (sizeof(W) == 2) {
    for (int k = threadIdx.x * 2; k < K; k += 512) {
      float low = x[k] * factor, high = x[k + 1] * factor;
      if constexpr (NORM) low *= norm[k], high *= norm[k + 1];
      *reinterpret_cast<unsigned*>(out + k) = bf16_pair(low, high);
    }
  } else {
    for (int k = threadIdx.x; k < K; k += 256) {
      float value = x[k] * factor;
      if constexpr (NORM) value *= norm[k];
      out[k] = value;
    }
  }
}

// x [rows, GROUPS, K] with w [GROUPS, N, K]; grid (ceil(N / BN), ceil(rows / BM), GROUPS).
template <int BM, int K, int GROUPS, class Sizes, class... Out>
V4C_DEVICE void gemm(const nv_bfloat16* x, const nv_bfloat16* w, int64_t rows, void* shared, Out... outputs) {
  using T = Tile<BM>;
  constexpr int N = Sizes::TOTAL;
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * BM;
  const int n0 = blockIdx.x * T::BN, group = blockIdx.z;
  float sums[T::MI][T::NI][4];
  clear(sums);
  auto a_row = [&](int r) -> const nv_bfloat16* {
    return r < 0 ? x : m0 + r < rows ? x + ((m0 + r) * GROUPS + group) * K : nullptr;
  };
  auto b_row = [&](int r) -> const nv_bfloat16* {
    return r < 0 ? w : n0 + r < N ? w + (static_cast<int64_t>(group) * N + n0 + r) * K : nullptr;
  };
  T::product(a_row, b_row, K, static_cast<char*>(shared), sums);
#pragma unroll
  for (int i = 0; i < T::MI; ++i)
#pragma unroll
    for (int j = 0; j < T::NI; ++j)
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int64_t m = m0 + T::row() + i * 16 + v / 2 * 8;
        const int n = n0 + T::column() + j * 8 + v % 2;
        if (m < rows && n < N) *Sizes::at(m * GROUPS + group, n, outputs...) = sums[i][j][v];
      }
}

// The same in float32: for float32 weights, and for rows that the copies of 16 bytes cannot take.
template <class W, int K, int GROUPS, class Sizes, class... Out>
V4C_DEVICE void gemm_f32(const float* x, const W* w, int64_t rows, Out... outputs) {
  using T = TileF32;
  constexpr int N = Sizes::TOTAL;
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * T::BM;
  const int n0 = blockIdx.x * T::BN, group = blockIdx.z;
  float sums[1][4][4];
  clear(sums);
  auto a_row = [&](int r) -> const float* {
    return m0 + r < rows ? x + ((m0 + r) * GROUPS + group) * K : nullptr;
  };
  auto b_row = [&](int r) -> const W* {
    return n0 + r < N ? w + (static_cast<int64_t>(group) * N + n0 + r) * K : nullptr;
  };
  T::template product<W>(a_row, b_row, K, sums);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t m = m0 + T::row() + i;
      const int n = n0 + T::column() + j;
      if (m < rows && n < N) *Sizes::at(m * GROUPS + group, n, outputs...) = sums[0][i][j];
    }
}

}  // namespace v4c
