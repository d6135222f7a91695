// Attention on tensor cores: a token's heads are the rows of a tile, and a key row, gathered once, serves them all.
//
// Scores are Q K^T, sums P V, where V is the same rows in shared memory, turned while they are loaded. Softmax with the
// sinks is float32 and online; queries, keys and the shares P are rounded to bfloat16.
//
// What it costs, per token of a prompt at V4-Flash's sizes (64 heads, C 512, 128 + 512 keys), on an H100 of 132
// processors at 1.7 GHz:
//   arithmetic     84 MFLOP; at the 2500 FLOP per cycle and processor that mma.sync reaches (some 62 % of what wgmma
//                  does, Luo et al. 2024), 33 000 cycles
//   shared memory  per 64 keys 64 KB arrive, scores read 256 KB (Q and K twice each) and pass 72 KB between warps, sums
//                  read 128 KB (P and V): 520 KB, and 5.2 MB in all; at 128 bytes a cycle, 41 000 cycles
//   second cache   640 rows of 1 KB, 0.66 MB; at 5.5 TB/s for all, 27 000 cycles. As float32 it would be 54 000, and
//                  would bind: so the rows are rounded once, before (`round_keys`)
//   device memory  q and the output, 0.26 MB; at 3.35 TB/s, 18 000 cycles
// Shared memory binds, closely followed by arithmetic: 0.18 us per token, 460 TFLOP/s, if all were overlapped. With one
// block of eight warps per processor and three barriers a tile it will not be; half of it is to be expected.
//
// A token that is read alone (decoding) has 640 rows of float32, 1.3 MB: 0.4 us of device memory, and, by 64 heads on
// ordinary units out of shared memory, 10 000 cycles of 64 blocks, or 6 us. So it takes tiles too, 16 heads high: 4 x 20
// blocks then read Q and keys of 96 KB each, in some 2000 cycles, and the latencies of four dependent steps bind.

namespace v4c {

// The tile of a block of 256 threads: M heads, KEYS keys at a time; BYTES of shared memory in all.
template <int M, int C, int KEYS>
struct HeadTile {
  static constexpr int WARPS = 8, THREADS = 256, MI = M / 16, STEPS = C / 16;
  // Scores: warps share out the heads, the keys 32 each, and what is left of them the dims, whose parts are then added.
  static constexpr int HEAD_GROUPS = MI == 4 ? 2 : 1, KEY_GROUPS = KEYS / 32;
  static constexpr int PARTS = WARPS / (HEAD_GROUPS * KEY_GROUPS), SI = MI / HEAD_GROUPS;
  static constexpr int PART_STEPS = (STEPS + PARTS - 1) / PARTS;
  // Sums: every warp has all heads of so many runs of 16 dims: 128 registers a thread at 64 heads of 512.
  static constexpr int RUNS = (STEPS + WARPS - 1) / WARPS;

  using Rows = MatrixRows<C>;
  static constexpr int KEY_TILE_BYTES = KEYS * Rows::BYTES, SCORE_ROW = KEYS * 4;
  static constexpr int KEY_TILES = M * Rows::BYTES, SCORES = KEY_TILES + 2 * KEY_TILE_BYTES;
  static constexpr int FOUND = SCORES + PARTS * M * SCORE_ROW, FACTORS = FOUND + 3 * KEYS * 8, BYTES = FACTORS + M * 4;

  // Four scores of a row, in floats; then, over those of part 0, eight shares of it in bfloat16.
  static V4C_DEVICE char* scores(char* tile, int part, int row, int chunk) {
    return tile + (part * M + row) * SCORE_ROW + (chunk ^ row % 4 * 2) * 16;
  }
  static V4C_DEVICE char* shares(char* tile, int row, int chunk) {
    return tile + row * SCORE_ROW + (chunk ^ row % 8) * 16;
  }

  // Parts of the scores of KEYS rows, for the warps' places in the tile.
  static V4C_DEVICE void product(char* queries, char* keys, char* to) {
    const int head0 = warp() % HEAD_GROUPS * SI * 16, key0 = warp() / HEAD_GROUPS % KEY_GROUPS * 32;
    const int part = warp() / (HEAD_GROUPS * KEY_GROUPS);
    const int a_row = head0 + lane() % 16, a_chunk = lane() / 16;
    const int b_row = key0 + lane() % 8 + lane() / 16 * 8, b_chunk = lane() / 8 % 2;
    float sums[SI][4][4];
    clear(sums);
#pragma unroll 4
    for (int i = 0; i < PART_STEPS; ++i) {
      const int step = part * PART_STEPS + i;
      if (STEPS % PARTS != 0 && step >= STEPS) break;
      unsigned a[SI][4], b[2][4];
#pragma unroll
      for (int m = 0; m < SI; ++m) load_matrices(a[m], Rows::at(queries, a_row + m * 16, step * 2 + a_chunk));
#pragma unroll
      for (int n = 0; n < 2; ++n) load_matrices(b[n], Rows::at(keys, b_row + n * 16, step * 2 + b_chunk));
#pragma unroll
      for (int m = 0; m < SI; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
#pragma unroll
    for (int m = 0; m < SI; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int high = 0; high < 2; ++high) {
          const int row = head0 + m * 16 + high * 8 + lane() / 4, key = key0 + n * 8 + lane() % 4 * 2;
          *reinterpret_cast<float2*>(scores(to, part, row, key / 4) + key % 4 * 4) =
              make_float2(sums[m][n][high * 2], sums[m][n][high * 2 + 1]);
        }
  }

  // sums += P V for this warp's dims, after what was there is multiplied by its head's factor.
  static V4C_DEVICE void add_values(char* probabilities, char* keys, const float* factors,
                                    float (&sums)[RUNS][MI][2][4]) {
    scale(factors, sums);
    const int a_row = lane() % 16, a_chunk = lane() / 16;
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
      unsigned a[MI][4];
#pragma unroll
      for (int m = 0; m < MI; ++m) load_matrices(a[m], shares(probabilities, a_row + m * 16, step * 2 + a_chunk));
#pragma unroll
      for (int r = 0; r < RUNS; ++r) {
        const int run = warp() * RUNS + r;
        if (STEPS % WARPS != 0 && run >= STEPS) break;
        unsigned b[4];
        load_turned(b, Rows::at(keys, step * 16 + a_row, run * 2 + a_chunk));
#pragma unroll
        for (int m = 0; m < MI; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n) multiply(sums[r][m][n], a[m], b[n * 2], b[n * 2 + 1]);
      }
    }
  }

  static V4C_DEVICE void scale(const float* factors, float (&sums)[RUNS][MI][2][4]) {
#pragma unroll
    for (int m = 0; m < MI; ++m)
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        const float factor = factors[m * 16 + high * 8 + lane() / 4];
#pragma unroll
        for (int r = 0; r < RUNS; ++r)
#pragma unroll
          for (int n = 0; n < 2; ++n) sums[r][m][n][high * 2] *= factor, sums[r][m][n][high * 2 + 1] *= factor;
      }
  }
};

// Online softmax of the heads of a tile, eight threads each: what they keep from one tile of keys to the next.
template <int M, int C, int KEYS>
struct HeadShares {
  using Tile = HeadTile<M, C, KEYS>;
  static constexpr int PASSES = (M + 31) / 32;
  float top[PASSES], under[PASSES];

  static V4C_DEVICE int row(int pass) { return pass * 32 + threadIdx.x / 8; }

  V4C_DEVICE void clear() {
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) top[pass] = -INF, under[pass] = 0;
  }

  // The scores' parts at `tile` become shares there; `factors` what earlier sums shrink by. `found`: null where no key is.
  template <class T>
  V4C_DEVICE void update(char* tile, const T* const* found, float* factors) {
    constexpr int CHUNKS = KEYS / 32;
    const int eighth = threadIdx.x % 8;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      if (row(pass) >= M) continue;  // a whole warp's rows
      float score[CHUNKS][4], highest = top[pass], sum = 0;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int chunk = c * 8 + eighth;
        Format<float>::load(reinterpret_cast<float*>(Tile::scores(tile, 0, row(pass), chunk)), score[c]);
#pragma unroll
        for (int part = 1; part < Tile::PARTS; ++part) {
          float other[4];
          Format<float>::load(reinterpret_cast<float*>(Tile::scores(tile, part, row(pass), chunk)), other);
#pragma unroll
          for (int v = 0; v < 4; ++v) score[c][v] += other[v];
        }
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          if (found[chunk * 4 + v] == nullptr) score[c][v] = -INF;
          highest = fmaxf(highest, score[c][v]);
        }
      }
#pragma unroll
      for (int step = 4; step > 0; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, step));
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          score[c][v] = score[c][v] == -INF ? 0 : expf(score[c][v] - highest);
          sum += score[c][v];
        }
#pragma unroll
      for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      const float factor = expf(top[pass] - highest);
      top[pass] = highest, under[pass] = fmaf(under[pass], factor, sum);
      if (eighth == 0) factors[row(pass)] = factor;
      __syncwarp();  // all scores of the row have been read, over which the shares go
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int chunk = c * 8 + eighth;
        *reinterpret_cast<uint2*>(Tile::shares(tile, row(pass), chunk / 2) + chunk % 2 * 8) =
            make_uint2(bf16_pair(score[c][0], score[c][1]), bf16_pair(score[c][2], score[c][3]));
      }
    }
  }
};

// Eight numbers as bfloat16: held ones, and such as lie in memory.
V4C_DEVICE uint4 rounded(const float (&v)[8]) {
  return make_uint4(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7]));
}
V4C_DEVICE uint4 read_rounded(const float* from, float scale) {
  float v[8];
  Format<float>::load(from, v);
  Format<float>::load(from + 4, v + 4);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] *= scale;
  return rounded(v);
}

// How a tile of keys gets into shared memory, 16 bytes of it a thread and turn: rows that were rounded before by copies
// past the registers; rows of float32 through them, where they wait until they are rounded.
template <class T, class Tile, int C, int KEYS>
struct KeyLoader {
  static constexpr int CHUNKS = KEYS * (C / 8), TURNS = (CHUNKS + Tile::THREADS - 1) / Tile::THREADS;
  static constexpr int AT_ONCE = sizeof(T) == 2 ? 4 : TURNS;  // more copies would take registers for their addresses
  float held[sizeof(T) == 2 ? 1 : TURNS][8];

  // `found`: where each key lies, null for none, which reads as zeros; `any` may be read.
  V4C_DEVICE void start(char* tile, const T* const* found, const T* any) {
#pragma unroll AT_ONCE
    for (int turn = 0; turn < TURNS; ++turn) {
      const int i = turn * Tile::THREADS + threadIdx.x, chunk = i % (C / 8);
      if (i >= CHUNKS) break;
      const T* from = found[i / (C / 8)];
      if constexpr (sizeof(T) == 2) {
        copy_async(Tile::Rows::at(tile, i / (C / 8), chunk), from == nullptr ? any : from + chunk * 8, from != nullptr);
      } else {
#pragma unroll
        for (int v = 0; v < 8; v += 4) {
          if (from != nullptr) Format<float>::load(from + chunk * 8 + v, held[turn] + v);
          else held[turn][v] = held[turn][v + 1] = held[turn][v + 2] = held[turn][v + 3] = 0;
        }
      }
    }
    commit_copies();
  }
  V4C_DEVICE void finish(char* tile) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int turn = 0; turn < TURNS; ++turn) {
        const int i = turn * Tile::THREADS + threadIdx.x;
        if (i >= CHUNKS) break;
        *reinterpret_cast<uint4*>(Tile::Rows::at(tile, i / (C / 8), i % (C / 8))) = rounded(held[turn]);
      }
    }
  }
};

// Grid (B * S, ceil(HEADS / M), splits), 256 threads, BYTES of shared memory. T is float or, of a prompt,
// bfloat16 that `round_keys` made. `out` and `peaks` as of `attention`.
template <class T, int HEADS, int C, int W, int TOP_K, int RATIO, int HALF, int M, int KEYS, bool PARTS,
          int BYTES>
V4C_DEVICE void attention_tiles(const float* q, const T* kv, const T* window, const T* rows, const int64_t* indices,
                                const float* sinks, const int64_t* positions, const int64_t* lengths,
                                const float* inv_freq, int64_t s, int64_t n_rows, float scale, float* out,
                                float* peaks, void* shared) {
  using Tile = HeadTile<M, C, KEYS>;
  static_assert(BYTES == Tile::BYTES, "shared memory of the launch");
  char* queries = static_cast<char*>(shared);
  char* key_tiles = queries + Tile::KEY_TILES;
  char* scores = queries + Tile::SCORES;
  const T** found = reinterpret_cast<const T**>(queries + Tile::FOUND);  // of this tile and the two to come
  float* factors = reinterpret_cast<float*>(queries + Tile::FACTORS);

  const int64_t token = blockIdx.x, batch = token / s, j = token % s;
  const Keys<T> keys = keys_of<C, W, TOP_K, RATIO>(kv, window, rows, indices, batch, j, s, n_rows, positions, lengths);
  const int64_t tiles_all = (keys.count + KEYS - 1) / KEYS, per_split = (tiles_all + gridDim.z - 1) / gridDim.z;
  const int64_t first = blockIdx.z * per_split;
  const int tiles = static_cast<int>(larger(0, smaller(tiles_all, first + per_split) - first));
  const int head0 = blockIdx.y * M, own = threadIdx.x;
  auto key_number = [&](int tile) { return (first + tile) * KEYS + own; };

  HeadShares<M, C, KEYS> shares;
  shares.clear();
  float sums[Tile::RUNS][Tile::MI][2][4];
#pragma unroll
  for (int r = 0; r < Tile::RUNS; ++r) clear(sums[r]);
  KeyLoader<T, Tile, C, KEYS> loader;

  if (tiles > 0) {
    if (own < KEYS)
      for (int tile = 0; tile < 2; ++tile)
        found[tile * KEYS + own] = keys.template at<C, W>(key_number(tile), keys.row(key_number(tile)));
    __syncthreads();
    loader.start(key_tiles, found, kv);
#pragma unroll 4
    for (int i = own; i < M * (C / 8); i += Tile::THREADS) {
      const int head = head0 + i / (C / 8), chunk = i % (C / 8);
      *reinterpret_cast<uint4*>(Tile::Rows::at(queries, i / (C / 8), chunk)) =
          head < HEADS ? read_rounded(q + (token * HEADS + head) * C + chunk * 8, scale) : make_uint4(0, 0, 0, 0);
    }
    loader.finish(key_tiles);
  }
  for (int tile = 0; tile < tiles; ++tile) {
    char* held = key_tiles + tile % 2 * Tile::KEY_TILE_BYTES;
    char* next = key_tiles + (tile + 1) % 2 * Tile::KEY_TILE_BYTES;
    wait_copies<0>();
    __syncthreads();  // the tile has arrived for all threads, and all are done with the one before
    if (tile + 1 < tiles) loader.start(next, found + (tile + 1) % 3 * KEYS, kv);
    const int64_t row = own < KEYS ? keys.row(key_number(tile + 2)) : -1;  // read well before it is used
    Tile::product(queries, held, scores);
    __syncthreads();
    shares.update(scores, found + tile % 3 * KEYS, factors);
    __syncthreads();
    Tile::add_values(scores, held, factors, sums);
    if (own < KEYS) found[(tile + 2) % 3 * KEYS + own] = keys.template at<C, W>(key_number(tile + 2), row);
    if (tile + 1 < tiles) loader.finish(next);
  }

  __syncthreads();  // the factors of the last tile have been read
#pragma unroll
  for (int pass = 0; pass < shares.PASSES; ++pass) {
    const int head = head0 + shares.row(pass);
    if (shares.row(pass) >= M || head >= HEADS || own % 8 != 0) continue;
    if constexpr (PARTS) {
      float* peak = peaks + ((token * gridDim.z + blockIdx.z) * HEADS + head) * 2;
      peak[0] = shares.top[pass], peak[1] = shares.under[pass];
    } else {
      const float highest = fmaxf(shares.top[pass], sinks[head]), factor = expf(shares.top[pass] - highest);
      factors[shares.row(pass)] = factor / fmaf(shares.under[pass], factor, expf(sinks[head] - highest));
    }
  }
  if constexpr (PARTS) {
    if (tiles == 0) return;
    out += (token * gridDim.z + blockIdx.z) * HEADS * C;
  } else {
    __syncthreads();
    Tile::scale(factors, sums);
    out += token * HEADS * C;
  }
#pragma unroll
  for (int r = 0; r < Tile::RUNS; ++r)
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int d = (warp() * Tile::RUNS + r) * 16 + n * 8 + lane() % 4 * 2;
      if (d >= C) continue;
      float sine = 0, cosine = 1;
      if constexpr (!PARTS && HALF > 0) angle_of<C, HALF>(d, positions[batch] + j, inv_freq, &sine, &cosine);
#pragma unroll
      for (int i = 0; i < 2 * Tile::MI; ++i) {
        const int head = head0 + i * 8 + lane() / 4;
        float even = sums[r][i / 2][n][i % 2 * 2], odd = sums[r][i / 2][n][i % 2 * 2 + 1];
        if constexpr (!PARTS && HALF > 0) rotate(even, odd, -sine, cosine);
        if (head < HEADS) *reinterpret_cast<float2*>(out + head * C + d) = make_float2(even, odd);
      }
    }
}

// Rounds what a chunk's tokens may read to bfloat16, each to the same place: the ring, this call's rows, and compressed
// rows as far as they can be chosen. Grid (any, B), 256 threads.
template <int C, int W, int RATIO>
V4C_DEVICE void round_keys(const float* kv, const float* window, const float* rows, const int64_t* positions,
                           const int64_t* lengths, int64_t s, int64_t n_rows, nv_bfloat16* kv_to,
                           nv_bfloat16* window_to, nv_bfloat16* rows_to) {
  constexpr int CHUNKS = C / 8;
  const int64_t batch = blockIdx.y, ready = smaller(n_rows, (positions[batch] + lengths[batch]) / RATIO);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < (W + s + ready) * CHUNKS;
       i += static_cast<int64_t>(gridDim.x) * 256) {
    const int64_t row = i / CHUNKS;
    const float* from = window + batch * W * C;
    nv_bfloat16* to = window_to + batch * W * C;
    int64_t at = i;
    if (row >= W + s) from = rows + batch * n_rows * C, to = rows_to + batch * n_rows * C, at -= (W + s) * CHUNKS;
    else if (row >= W) from = kv + batch * s * C, to = kv_to + batch * s * C, at -= W * CHUNKS;
    *reinterpret_cast<uint4*>(to + at * 8) = read_rounded(from + at * 8, 1.0f);
  }
}

}  // namespace v4c
