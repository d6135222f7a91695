// Products with many rows: float32 on the ordinary units, others on the tensor cores with copies four stages ahead.
//
// Both take their rows through functions of a row number, so that experts' rows, which lie anywhere, need no gathering.

namespace v4c {

// Swizzled rows of 64 bytes: the same sixteen of eight neighbouring rows lie in different banks.
V4C_DEVICE char* swizzled(char* tile, int row, int chunk) { return tile + row * 64 + ((chunk ^ (row / 2 % 4)) * 16); }

// Copies of 32 bfloat16 of each of ROWS rows, by 256 threads. `row_of(r)` is where a row begins, null where there is
// none, and of -1 an address that may always be read.
template <int ROWS>
struct FloatOperand {
  static constexpr int STAGE_BYTES = ROWS * 64, LOADS = ROWS / 64;
  const nv_bfloat16* from[LOADS];
  const nv_bfloat16* readable;

  template <class F>
  V4C_DEVICE FloatOperand(F row_of) : readable(row_of(-1)) {
#pragma unroll
    for (int i = 0; i < LOADS; ++i) from[i] = row_of(i * 64 + threadIdx.x / 4);
  }
  V4C_DEVICE void fetch(char* stage, int step, int k_size) const {
    const int chunk = threadIdx.x % 4, k = step * 32 + chunk * 8;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const bool valid = from[i] != nullptr && k < k_size;
      copy_async(swizzled(stage, i * 64 + threadIdx.x / 4, chunk), valid ? from[i] + k : readable, valid);
    }
  }
};

// The same of coded weights, which arrive as codes and become bfloat16 in shared memory one step before they are used.
template <int ROWS, class W, int K>
struct CodedOperand {
  using R = Rows<W, K>;
  static constexpr int CHUNKS = W::BITS / 4;  // of 16 bytes, for 32 codes
  static constexpr int STAGE_BYTES = ROWS * CHUNKS * 16, TILE_BYTES = ROWS * 64, WORDS = W::BITS / 2;
  static_assert(ROWS == 128 && W::BITS <= 8, "a thread has sixteen codes to decode and at most one chunk to copy");
  const unsigned char *copied, *decoded, *readable;
  float scale;  // of this thread's codes of the next step

  template <class F>
  V4C_DEVICE CodedOperand(F row_of)
      : copied(threadIdx.x / CHUNKS < ROWS ? row_of(threadIdx.x / CHUNKS) : nullptr),
        decoded(row_of(threadIdx.x / 2)), readable(row_of(-1)) {
    read_scale(0);
  }
  V4C_DEVICE void read_scale(int step) {
    scale = decoded != nullptr && step * 32 < K ? R::scale(decoded, step * 32) : 0.0f;
  }
  V4C_DEVICE void fetch(char* stage, int step, int k_size) const {
    if (threadIdx.x >= ROWS * CHUNKS) return;
    const int k = step * 32 + threadIdx.x % CHUNKS * (128 / W::BITS);
    const bool valid = copied != nullptr && k < k_size;
    copy_async(stage + threadIdx.x * 16, valid ? copied + k * W::BITS / 8 : readable, valid);
  }
  // The codes of `step` in `stage`, which has arrived, to the tile that `multiply_stage` reads.
  V4C_DEVICE void decode(const char* stage, char* tile, int step) {
    const int row = threadIdx.x / 2, half = threadIdx.x % 2;
    const char* from = stage + threadIdx.x * WORDS * 4;
    unsigned words[WORDS];
    if constexpr (WORDS == 4) {
      const uint4 read = *reinterpret_cast<const uint4*>(from);
      words[0] = read.x, words[1] = read.y, words[2] = read.z, words[3] = read.w;
    } else {
      const uint2 read = *reinterpret_cast<const uint2*>(from);
      words[0] = read.x, words[1] = read.y;
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      unsigned eight[WORDS / 2];
#pragma unroll
      for (int i = 0; i < WORDS / 2; ++i) eight[i] = words[part * (WORDS / 2) + i];
      float values[8];
      W::decode(eight, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = values[i] * W::FACTOR * scale;
      uint4 made = {bf16_pair(values[0], values[1]), bf16_pair(values[2], values[3]), bf16_pair(values[4], values[5]),
                    bf16_pair(values[6], values[7])};
      *reinterpret_cast<uint4*>(swizzled(tile, row, half * 2 + part)) = made;
    }
    read_scale(step + 1);
  }
};

// A [rows, K] of bfloat16 and B [N, K] of weights W in tiles of BM x 128, K 32 at a time; 256 threads as 2 x 4 warps.
template <int BM, class W, int K>
struct Tile {
  static constexpr int BN = 128, BK = 32, STAGES = 4;
  static constexpr int MI = BM / 32, NI = 4;  // 16 x 8 fragments of one warp: BM / 2 rows, 32 columns
  static constexpr bool CODED = Rows<W, K>::CODED;

  static V4C_DEVICE int row() { return warp() / 4 * (BM / 2) + lane() / 4; }
  static V4C_DEVICE int column() { return warp() % 4 * 32 + lane() % 4 * 2; }

  static V4C_DEVICE void multiply_stage(char* a_tile, char* b_tile, float (&sums)[MI][NI][4]) {
    const int a_first = warp() / 4 * (BM / 2) + lane() % 8 + lane() / 8 % 2 * 8, a_chunk = lane() / 16;
    const int b_first = warp() % 4 * 32 + lane() % 8 + lane() / 16 * 8, b_chunk = lane() / 8 % 2;
#pragma unroll
    for (int half = 0; half < BK / 16; ++half) {
      unsigned a[MI][4], b[NI / 2][4];
#pragma unroll
      for (int i = 0; i < MI; ++i) load_matrices(a[i], swizzled(a_tile, a_first + i * 16, half * 2 + a_chunk));
#pragma unroll
      for (int j = 0; j < NI / 2; ++j) load_matrices(b[j], swizzled(b_tile, b_first + j * 16, half * 2 + b_chunk));
#pragma unroll
      for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int j = 0; j < NI; ++j) multiply(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }

  // sums += A B^T. `a_row(r)` and `b_row(n)` give rows of the tile, as `FloatOperand` takes them.
  template <class A, class B>
  static V4C_DEVICE void product(A a_row, B b_row, char* shared, float (&sums)[MI][NI][4]) {
    constexpr int STEPS = (K + BK - 1) / BK;
    using Columns = typename Either<CODED, CodedOperand<BN, W, K>, FloatOperand<BN>>::Type;
    constexpr int A_BYTES = FloatOperand<BM>::STAGE_BYTES, STAGE_BYTES = A_BYTES + Columns::STAGE_BYTES;
    const FloatOperand<BM> a(a_row);
    Columns b(b_row);
    auto a_stage = [&](int step) { return shared + step % STAGES * STAGE_BYTES; };
    auto b_stage = [&](int step) { return a_stage(step) + A_BYTES; };
    auto b_tile = [&](int step) {  // what is multiplied: of codes, one of two tiles behind the stages
      if constexpr (CODED) return shared + STAGES * STAGE_BYTES + step % 2 * Columns::TILE_BYTES;
      else return b_stage(step);
    };
    auto fetch = [&](int step) {
      if (step < STEPS) a.fetch(a_stage(step), step, K), b.fetch(b_stage(step), step, K);
      commit_copies();
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) fetch(step);
    if constexpr (CODED) {
      wait_copies<STAGES - 2>();
      __syncthreads();
      b.decode(b_stage(0), b_tile(0), 0);
    }
    for (int step = 0; step < STEPS; ++step) {
      wait_copies<STAGES - 2 - CODED>();
      __syncthreads();  // what is read below has arrived for all threads, and all are done with what is refilled
      fetch(step + STAGES - 1);
      if constexpr (CODED) {
        if (step + 1 < STEPS) b.decode(b_stage(step + 1), b_tile(step + 1), step + 1);
      }
      multiply_stage(a_stage(step), b_tile(step), sums);
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

  // As `Tile::product`; B is of weights W.
  template <class W, int K, class A, class B>
  static V4C_DEVICE void product(A a_row, B b_row, float (&sums)[1][4][4]) {
    __shared__ __align__(16) float a_tile[BK][BM + 4], b_tile[BK][BN + 4];
    const float* a_from = a_row(threadIdx.x / 4);
    const typename Rows<W, K>::Stored* b_from = b_row(threadIdx.x / 4);
    for (int k0 = 0; k0 < K; k0 += BK) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int k = threadIdx.x % 4 * 4 + i;
        bool inside = k0 + k < K;
        a_tile[k][threadIdx.x / 4] = a_from != nullptr && inside ? a_from[k0 + k] : 0;
        b_tile[k][threadIdx.x / 4] = b_from != nullptr && inside ? Rows<W, K>::one(b_from, k0 + k) : 0;
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
template <int BM, class W, int K, int GROUPS, class Sizes, class... Out>
V4C_DEVICE void gemm(const nv_bfloat16* x, const typename Rows<W, K>::Stored* w, int64_t rows, void* shared,
                     Out... outputs) {
  using T = Tile<BM, W, K>;
  constexpr int N = Sizes::TOTAL;
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * BM;
  const int n0 = blockIdx.x * T::BN, group = blockIdx.z;
  float sums[T::MI][T::NI][4];
  clear(sums);
  auto a_row = [&](int r) -> const nv_bfloat16* {
    return r < 0 ? x : m0 + r < rows ? x + ((m0 + r) * GROUPS + group) * K : nullptr;
  };
  auto b_row = [&](int r) -> const typename Rows<W, K>::Stored* {
    return r < 0 ? w : n0 + r < N ? w + (static_cast<int64_t>(group) * N + n0 + r) * Rows<W, K>::SIZE : nullptr;
  };
  T::product(a_row, b_row, static_cast<char*>(shared), sums);
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
V4C_DEVICE void gemm_f32(const float* x, const typename Rows<W, K>::Stored* w, int64_t rows, Out... outputs) {
  using T = TileF32;
  constexpr int N = Sizes::TOTAL;
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * T::BM;
  const int n0 = blockIdx.x * T::BN, group = blockIdx.z;
  float sums[1][4][4];
  clear(sums);
  auto a_row = [&](int r) -> const float* {
    return m0 + r < rows ? x + ((m0 + r) * GROUPS + group) * K : nullptr;
  };
  auto b_row = [&](int r) -> const typename Rows<W, K>::Stored* {
    return n0 + r < N ? w + (static_cast<int64_t>(group) * N + n0 + r) * Rows<W, K>::SIZE : nullptr;
  };
  T::template product<W, K>(a_row, b_row, sums);
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
