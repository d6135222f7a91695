// How rows of weights lie in memory: of floats, or of codes with scales behind them, 16 bytes at a time.
//
// A row of K codes is one run of bytes: the codes, filled up to whole 16 bytes with codes of zero, then the scales,
// filled up likewise (targets/cuda/coded_rows.py). Codes become floats in registers:
//
//   Fp8    E4M3, a scale (E8M0) per 128; as a half with the exponent 8 too small, so 256 times too small
//   Fp4    E2M1, two to a byte, the even one in the low bits, a scale (E8M0) per 32; as a half, 2^14 times too small
//   Int8   code + 128, a scale (half) per 32; as the last bits of 2^23
//   Int4   code + 8, two to a byte, the even one in the low bits, a scale (half) per 32; likewise
//
// All of it is exact: halves keep numbers below their normal ones, and factors are powers of two. A bfloat16 holds any
// value of an E4M3 or E2M1 code, and rounds those of an integer times a half.

namespace v4c {

struct Fp8 {
  static constexpr int BITS = 8, GROUP = 128, SCALE_BYTES = 1;
  static constexpr float FACTOR = 256.0f;  // of what `decode` gives, besides the scale

  static V4C_DEVICE void decode(const unsigned (&words)[2], float (&to)[8]) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const unsigned two = words[pair / 2] >> (pair % 2 * 16);
      const unsigned high = (two & 0xffu) << 8 | (two & 0xff00u) << 16;  // the codes as upper bytes of halves
      halves_as_floats((high & 0x7f007f00u) >> 1 | (high & 0x80008000u), to[pair * 2], to[pair * 2 + 1]);
    }
  }
  static V4C_DEVICE float scale(const unsigned char* scales, int group) { return e8m0(scales[group]); }
};

struct Fp4 {
  static constexpr int BITS = 4, GROUP = 32, SCALE_BYTES = 1;
  static constexpr float FACTOR = 16384.0f;

  static V4C_DEVICE void decode(const unsigned (&words)[1], float (&to)[8]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // codes j and j + 4, 16 bits apart
      const unsigned two = words[0] >> (4 * j);
      halves_as_floats((two & 0x00070007u) << 9 | (two & 0x00080008u) << 12, to[j], to[j + 4]);
    }
  }
  static V4C_DEVICE float scale(const unsigned char* scales, int group) { return e8m0(scales[group]); }
};

struct Int8 {
  static constexpr int BITS = 8, GROUP = 32, SCALE_BYTES = 2;
  static constexpr float FACTOR = 1.0f;

  static V4C_DEVICE void decode(const unsigned (&words)[2], float (&to)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      to[i] = bits_float(0x4b000000u | (words[i / 4] >> (i % 4 * 8) & 0xffu)) - (8388608.0f + 128.0f);
  }
  static V4C_DEVICE float scale(const unsigned char* scales, int group) { return half_at(scales + 2 * group); }
};

struct Int4 {
  static constexpr int BITS = 4, GROUP = 32, SCALE_BYTES = 2;
  static constexpr float FACTOR = 1.0f;

  static V4C_DEVICE void decode(const unsigned (&words)[1], float (&to)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = bits_float(0x4b000000u | (words[0] >> (4 * i) & 0xfu)) - (8388608.0f + 8.0f);
  }
  static V4C_DEVICE float scale(const unsigned char* scales, int group) { return half_at(scales + 2 * group); }
};

// Rows of K weights W. `Stored` is what a pointer to them points to, SIZE a row's length in that.
// STEP consecutive weights are read at once, to be multiplied by `scale` when they have been added up.
template <class W, int K>
struct Rows {
  using Stored = unsigned char;
  static constexpr bool CODED = true;
  static constexpr int CODE_BYTES = (K * W::BITS / 8 + (K * W::BITS % 8 != 0) + 15) / 16 * 16;
  static constexpr int GROUPS = (K + W::GROUP - 1) / W::GROUP;
  static constexpr int SIZE = CODE_BYTES + (GROUPS * W::SCALE_BYTES + 15) / 16 * 16;
  static constexpr int STEP = K % 8 == 0 ? 8 : 1;

  static V4C_DEVICE void eight(const unsigned char* row, int k, float (&to)[8]) {
    if constexpr (W::BITS == 8) {
      const uint2 read = *reinterpret_cast<const uint2*>(row + k);
      const unsigned words[2] = {read.x, read.y};
      W::decode(words, to);
    } else {
      const unsigned words[1] = {*reinterpret_cast<const unsigned*>(row + k / 2)};
      W::decode(words, to);
    }
  }
  static V4C_DEVICE float code(const unsigned char* row, int k) {
    float all[8];
    eight(row, k / 8 * 8, all);
    float found = all[0];
#pragma unroll
    for (int i = 1; i < 8; ++i) found = k % 8 == i ? all[i] : found;
    return found;
  }
  static V4C_DEVICE void load(const unsigned char* row, int k, float (&to)[STEP]) {
    if constexpr (STEP == 8) eight(row, k, to);
    else to[0] = code(row, k);
  }
  static V4C_DEVICE float scale(const unsigned char* row, int k) { return W::scale(row + CODE_BYTES, k / W::GROUP); }
  static V4C_DEVICE float one(const unsigned char* row, int k) {
    return code(row, k) * W::FACTOR * scale(row, k);
  }
};

template <class F, int K>
struct FloatRows {
  using Stored = F;
  static constexpr bool CODED = false;
  static constexpr int SIZE = K, STEP = K % Format<F>::PER == 0 ? Format<F>::PER : 1;

  static V4C_DEVICE void load(const F* row, int k, float (&to)[STEP]) {
    if constexpr (STEP > 1) Format<F>::load(row + k, to);
    else to[0] = Format<F>::one(row + k);
  }
  static V4C_DEVICE float scale(const F*, int) { return 1.0f; }
  static V4C_DEVICE float one(const F* row, int k) { return Format<F>::one(row + k); }
};

template <int K> struct Rows<float, K> : FloatRows<float, K> {};
template <int K> struct Rows<nv_bfloat16, K> : FloatRows<nv_bfloat16, K> {};

}  // namespace v4c
