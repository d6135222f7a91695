// The indexer's scores on tensor cores, of queries and rows rounded to bfloat16; sums over heads are float32.
//
// A warp keeps 32 compressed rows in registers and lets the heads of one token after another pass through shared memory: 16
// FLOP per byte of it for 16 rows, 32 for these, so mma.sync (2500 FLOP per cycle and processor) binds, not the 128 bytes.

namespace v4c {

template <int HEADS, int C>
struct IndexTile {
  static constexpr int ROWS = 256, WARP_ROWS = 32, THREADS = 256, STEPS = C / 16;
  static constexpr int ALL_HEADS = (HEADS + 15) / 16 * 16;
  using Queries = MatrixRows<C>;
  static constexpr int QUERY_BYTES = ALL_HEADS * Queries::BYTES, BYTES = 2 * QUERY_BYTES;

  // This warp's rows from n0 on as fragments; zeros behind the last.
  static V4C_DEVICE void load(const float* rows, int64_t n0, int64_t n_rows, unsigned (&a)[2][STEPS][4]) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        const int64_t n = n0 + m * 16 + high * 8 + lane() / 4;
#pragma unroll
        for (int part = 0; part < 2 * STEPS; ++part) {
          float2 pair = make_float2(0, 0);
          if (n < n_rows) pair = *reinterpret_cast<const float2*>(rows + n * C + part * 8 + lane() % 4 * 2);
          a[m][part / 2][part % 2 * 2 + high] = bf16_pair(pair.x, pair.y);
        }
      }
  }

  // totals[m][high] += sum over this lane's heads of weight relu(q . row).
  static V4C_DEVICE void score(const unsigned (&a)[2][STEPS][4], char* queries, const float* weights,
                               float (&totals)[2][2]) {
#pragma unroll 1
    for (int h0 = 0; h0 < ALL_HEADS; h0 += 16) {
      float sums[2][2][4];
      clear(sums);
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        unsigned b[4];
        load_matrices(b, Queries::at(queries, h0 + lane() % 8 + lane() / 16 * 8, step * 2 + lane() / 8 % 2));
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n) multiply(sums[m][n], a[m][step], b[n * 2], b[n * 2 + 1]);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const int head = h0 + n * 8 + lane() % 4 * 2 + v % 2;
          const float weight = head < HEADS ? weights[head] : 0;
#pragma unroll
          for (int m = 0; m < 2; ++m) totals[m][v / 2] = fmaf(weight, fmaxf(sums[m][n][v], 0.0f), totals[m][v / 2]);
        }
    }
  }
};

// scores[token - first][n] of ready rows, as `index_scores`. Grid (ceil(n_rows / 256), ceil(tokens of this call / TOKENS)),
// 256 threads, BYTES of shared memory.
template <int HEADS, int C, int RATIO, int TOKENS, int BYTES>
V4C_DEVICE void index_scores_tiles(const nv_bfloat16* q, const float* weights, const float* rows,
                                   const int64_t* positions, const int64_t* lengths, int64_t first, int64_t tokens,
                                   int64_t s, int64_t n_rows, float* scores, void* shared) {
  using Tile = IndexTile<HEADS, C>;
  static_assert(BYTES == Tile::BYTES, "shared memory of the launch");
  const int64_t begin = first + static_cast<int64_t>(blockIdx.y) * TOKENS, end = smaller(tokens, begin + TOKENS);
  const int64_t block0 = static_cast<int64_t>(blockIdx.x) * Tile::ROWS, n0 = block0 + warp() * Tile::WARP_ROWS;
  char* queries = static_cast<char*>(shared);

  auto fetch = [&](int64_t token) {
    for (int i = threadIdx.x; i < Tile::ALL_HEADS * (C / 8); i += Tile::THREADS) {
      const int head = i / (C / 8), chunk = i % (C / 8);
      const nv_bfloat16* from = q + (token * HEADS + head) * C + chunk * 8;
      copy_async(Tile::Queries::at(queries + (token - begin) % 2 * Tile::QUERY_BYTES, head, chunk),
                 head < HEADS ? from : q, head < HEADS);
    }
  };

  unsigned held[2][Tile::STEPS][4];
  int64_t batch = -1;  // whose rows are held
  if (begin < end) fetch(begin);
  commit_copies();
  for (int64_t token = begin; token < end; ++token) {
    wait_copies<0>();
    __syncthreads();  // the token's queries have arrived, and all are done with the ones before
    if (token + 1 < end) fetch(token + 1);
    commit_copies();
    const int64_t ready = ready_rows(token, s, n_rows, RATIO, positions, lengths);
    if (block0 >= ready) continue;
    if (token / s != batch) {
      batch = token / s;
      Tile::load(rows + batch * n_rows * C, n0, n_rows, held);
    }
    float totals[2][2] = {{0, 0}, {0, 0}};
    Tile::score(held, queries + (token - begin) % 2 * Tile::QUERY_BYTES, weights + token * HEADS, totals);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float total = totals[i / 2][i % 2];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const int64_t n = n0 + i * 8 + lane() / 4;
      if (lane() % 4 == 0 && n < ready) scores[(token - first) * n_rows + n] = total;
    }
  }
}

}  // namespace v4c
