// Engram: hash the last tokens into table addresses, fetch the rows, gate and convolve them.

namespace v4c {

// Grid (tokens), one warp. Arithmetic wraps around in 64 bits, so it is done unsigned.
template <int GRAM, int ADDRESSES>
V4C_DEVICE void engram_hash(const int64_t* ids, const int64_t* lookup, const int64_t* multipliers,
                            const int64_t* primes, const int64_t* offsets, const int64_t* history,
                            const int64_t* positions, const int64_t* lengths, int64_t s, int64_t pad_id,
                            int64_t* addresses) {
  constexpr int RING = GRAM - 1, HEADS = ADDRESSES / RING;
  const int64_t token = blockIdx.x, batch = token / s, j = token % s;
  const bool live = j < lengths[batch];
  for (int a = threadIdx.x; a < ADDRESSES; a += WARP) {
    int64_t address = 0;
    if (live) {
      unsigned long long mixed = static_cast<unsigned long long>(lookup[ids[token]]) *
                                 static_cast<unsigned long long>(multipliers[0]);
      for (int back = 1; back <= a / HEADS + 1; ++back) {
        const int64_t t = positions[batch] + j - back;
        const int64_t id = t < 0 ? lookup[pad_id] : back <= j ? lookup[ids[token - back]]
                                                              : history[batch * RING + t % RING];
        mixed ^= static_cast<unsigned long long>(id) * static_cast<unsigned long long>(multipliers[back]);
      }
      address = static_cast<int64_t>(mixed) % primes[a];
      if (address < 0) address += primes[a];
    }
    addresses[token * ADDRESSES + a] = address + offsets[a];
  }
}

// The last live ids into the ring, after all hashes have read it. Grid (tokens), one warp.
template <int GRAM>
V4C_DEVICE void engram_history(const int64_t* ids, const int64_t* lookup, const int64_t* positions,
                               const int64_t* lengths, int64_t s, int64_t* history) {
  constexpr int RING = GRAM - 1;
  const int64_t token = blockIdx.x, batch = token / s, j = token % s;
  if (threadIdx.x == 0 && j < lengths[batch] && j >= lengths[batch] - RING)
    history[batch * RING + (positions[batch] + j) % RING] = lookup[ids[token]];
}

// What a lane fetches of a row at once: 16 bytes, or one element where rows do not begin at multiples of 16 bytes.
template <class W>
struct Sixteen { using Bytes = uint4; };
template <>
struct Sixteen<float> { using Bytes = float4; };

template <class W, bool WHOLE>
struct Piece {
  static constexpr int PER = Format<W>::PER;
  typename Sixteen<W>::Bytes held;
  V4C_DEVICE void store(float* out) const {
    float values[PER];
    Format<W>::load(reinterpret_cast<const W*>(&held), values);
#pragma unroll
    for (int i = 0; i < PER; i += 4)
      *reinterpret_cast<float4*>(out + i) = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
  }
};

template <class W>
struct Piece<W, false> {
  static constexpr int PER = 1;
  W held;
  V4C_DEVICE void store(float* out) const { *out = Format<W>::one(&held); }
};

// Rows of the table, side by side; `rows` is how many. The table lies in host memory: a row comes over PCIe a
// microsecond or two after it was asked for, so that the link is only busy with tens of kilobytes on their way. Every
// thread asks for PIECES before it uses the first; neighbours ask for neighbouring ones, so that a request is a row.
// Grid (pieces of all rows / (128 PIECES)), 128 threads.
template <class W, int WIDTH, int PIECES>
V4C_DEVICE void engram_lookup(const W* table, const int64_t* addresses, int64_t rows, float* out) {
  using P = Piece<W, WIDTH % Format<W>::PER == 0>;
  constexpr int PER_ROW = WIDTH / P::PER;
  const int64_t first = blockIdx.x * static_cast<int64_t>(128 * PIECES) + threadIdx.x, all = rows * PER_ROW;
  P pieces[PIECES];
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const int64_t at = smaller(first + i * 128, all - 1);  // no branch, so that no load waits for the one before
    pieces[i] = *reinterpret_cast<const P*>(table + addresses[at / PER_ROW] * WIDTH + at % PER_ROW * P::PER);
  }
  __syncthreads();  // or the compiler puts loads behind the first stores, which wait for the first piece
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const int64_t at = first + i * 128;
    if (at < all) pieces[i].store(out + at * P::PER);
  }
}

// The gate of each token and stream, and factor of the norm before the convolution: gates [tokens, M, 2].
// Grid (tokens, M), 256 threads.
template <int M, int D>
V4C_DEVICE void engram_gate(const float* keys, const float* value, const float* streams, const float* key_norm,
                            const float* stream_norm, float eps, float* gates) {
  const int64_t token = blockIdx.x, at = token * M + blockIdx.y;
  float key_squares = 0, stream_squares = 0, dot = 0, value_squares = 0;
  for (int d = threadIdx.x; d < D; d += 256) {
    const float key = keys[at * D + d], stream = streams[at * D + d], v = value[token * D + d];
    key_squares += key * key, stream_squares += stream * stream, value_squares += v * v;
    dot += key * key_norm[blockIdx.y * D + d] * stream * stream_norm[blockIdx.y * D + d];
  }
  key_squares = block_sum<256>(key_squares), stream_squares = block_sum<256>(stream_squares);
  dot = block_sum<256>(dot), value_squares = block_sum<256>(value_squares);
  const float x = dot * rsqrtf(key_squares / D + eps) * rsqrtf(stream_squares / D + eps) / sqrtf(D);
  const float root = sqrtf(fmaxf(fabsf(x), 1e-6f));
  const float gate = sigmoid(x > 0 ? root : x < 0 ? -root : 0.0f);
  if (threadIdx.x == 0) {
    gates[at * 2] = gate;
    gates[at * 2 + 1] = gate * rsqrtf(gate * gate * value_squares / D + eps);
  }
}

// Grid (tokens, M), 256 threads: streams + gated value + SiLU of its convolution over the past.
template <int M, int D, int TAPS, int DILATION>
V4C_DEVICE void engram_conv(const float* gates, const float* value, const float* streams, const float* conv_norm,
                            const float* conv_weight, const float* state, const int64_t* positions, int64_t s,
                            float* out) {
  constexpr int RING = (TAPS - 1) * DILATION;
  const int64_t token = blockIdx.x, batch = token / s, j = token % s;
  const int m = blockIdx.y;
  for (int d = threadIdx.x; d < D; d += 256) {
    float sum = 0;
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap) {
      const int64_t back = (TAPS - 1 - tap) * DILATION, t = positions[batch] + j - back;
      if (t < 0) continue;
      const float c = back <= j
          ? gates[((token - back) * M + m) * 2 + 1] * value[(token - back) * D + d] * conv_norm[m * D + d]
          : state[(batch * RING + t % RING) * M * D + m * D + d];
      sum = fmaf(conv_weight[(static_cast<int64_t>(m) * D + d) * TAPS + tap], c, sum);
    }
    const int64_t at = (token * M + m) * D + d;
    out[at] = streams[at] + gates[(token * M + m) * 2] * value[token * D + d] + sum * sigmoid(sum);
  }
}

// The last live inputs of the convolution into its ring. Grid (tokens, M), 256 threads.
template <int M, int D, int TAPS, int DILATION>
V4C_DEVICE void engram_state(const float* gates, const float* value, const float* conv_norm, const int64_t* positions,
                             const int64_t* lengths, int64_t s, float* state) {
  constexpr int RING = (TAPS - 1) * DILATION;
  const int64_t token = blockIdx.x, batch = token / s, j = token % s;
  const int m = blockIdx.y;
  if (j >= lengths[batch] || j < lengths[batch] - RING) return;
  for (int d = threadIdx.x; d < D; d += 256)
    state[(batch * RING + (positions[batch] + j) % RING) * M * D + m * D + d] =
        gates[(token * M + m) * 2 + 1] * value[token * D + d] * conv_norm[m * D + d];
}

}  // namespace v4c
