// What every kernel uses: vector loads of a weight dtype as floats, reductions over a warp and a block, activations.
//
// Device functions only. Each is called by a __global__ function that TVM writes (targets/cuda/launch.py); the same text
// is compiled by nvcc for a GPU and by g++ for the simulator (targets/cuda/simulator), which supplies the intrinsics.
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#define V4C_DEVICE __device__ __forceinline__

namespace v4c {

constexpr int WARP = 32;
constexpr float INF = 3.402823466e+38f;  // stands for infinity: a difference of two of them is 0, not NaN

// One of two types; NVRTC has no <type_traits>.
template <bool FIRST, class A, class B> struct Either { using Type = A; };
template <class A, class B> struct Either<false, A, B> { using Type = B; };

V4C_DEVICE int lane() { return threadIdx.x % WARP; }
V4C_DEVICE int warp() { return threadIdx.x / WARP; }

V4C_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
V4C_DEVICE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

V4C_DEVICE float bits_float(unsigned bits) { return __uint_as_float(bits); }

// Two floats as two bfloat16 in one word, the first in the low half, rounded to nearest even.
V4C_DEVICE unsigned bf16_pair(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<unsigned*>(&pair);
}

// The halves in a word as floats, exactly.
V4C_DEVICE void halves_as_floats(unsigned word, float& low, float& high) {
  const __half2 halves = *reinterpret_cast<const __half2*>(&word);
  low = __low2float(halves), high = __high2float(halves);
}

// The half that lies at an even address.
V4C_DEVICE float half_at(const unsigned char* from) {
  return __half2float(*reinterpret_cast<const __half*>(from));
}

// 2^(code - 127): a scale of the OCP Microscaling formats; code 255 is NaN.
V4C_DEVICE float e8m0(unsigned char code) {
  return code == 255 ? bits_float(0x7fc00000u) : code == 0 ? bits_float(0x00400000u) : bits_float(code << 23);
}

// A dtype of floats: PER elements fill the 16 bytes of one load.
template <class W>
struct Format;

template <>
struct Format<float> {
  static constexpr int PER = 4;
  static V4C_DEVICE void load(const float* from, float* to) {
    float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w;
  }
  static V4C_DEVICE float one(const float* from) { return *from; }
};

template <>
struct Format<nv_bfloat16> {
  static constexpr int PER = 8;
  static V4C_DEVICE void load(const nv_bfloat16* from, float* to) {
    uint4 v = *reinterpret_cast<const uint4*>(from);
    unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = bits_float(words[i] << 16);
      to[2 * i + 1] = bits_float(words[i] & 0xffff0000u);
    }
  }
  static V4C_DEVICE float one(const nv_bfloat16* from) {
    return bits_float(static_cast<unsigned>(*reinterpret_cast<const unsigned short*>(from)) << 16);
  }
};

V4C_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

V4C_DEVICE float warp_max(float value) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

// Sum over a block of whole warps, for every thread; in the same order whatever the launch.
template <int THREADS>
V4C_DEVICE float block_sum(float value) {
  __shared__ float parts[THREADS / WARP];
  value = warp_sum(value);
  __syncthreads();  // the parts of an earlier sum have been read
  if (lane() == 0) parts[warp()] = value;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int i = 0; i < THREADS / WARP; ++i) total += parts[i];
  return total;
}

V4C_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

V4C_DEVICE float clamped_swiglu(float gate, float up, float limit) {
  gate = fminf(gate, limit);
  return gate * sigmoid(gate) * fminf(fmaxf(up, -limit), limit);
}

// sqrt(softplus(x)), the score of an expert.
V4C_DEVICE float expert_score(float x) { return sqrtf(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)))); }

// 16 bytes from device memory into shared memory without passing registers; zeros where `valid` is false.
V4C_DEVICE void copy_async(void* to, const void* from, bool valid);
V4C_DEVICE void commit_copies();
// Wait until at most LEFT of the groups committed last are under way.
template <int LEFT>
V4C_DEVICE void wait_copies();
// Four 8 x 8 matrices of 16-bit numbers out of shared memory, in the order of the fragments of `multiply`.
V4C_DEVICE void load_matrices(unsigned (&fragments)[4], const void* row);
// The same, each matrix turned: rows in memory are then what `multiply` sums over.
V4C_DEVICE void load_turned(unsigned (&fragments)[4], const void* row);
// d += a b, a [16, 16], b [16, 8] of bfloat16, d float32.
V4C_DEVICE void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

// Rows of C bfloat16 in shared memory, C a multiple of 16, of which eight lie at one chunk of 16 bytes in different banks:
// chunks are permuted, or, where their number is no multiple of eight, there is one more, which makes it odd.
template <int C>
struct MatrixRows {
  static constexpr bool PERMUTED = C % 64 == 0;
  static constexpr int BYTES = (C / 8 + (PERMUTED ? 0 : 1)) * 16;

  static V4C_DEVICE char* at(char* rows, int row, int chunk) {
    return rows + row * BYTES + (PERMUTED ? chunk ^ row % 8 : chunk) * 16;
  }
};

#ifdef __CUDACC__
V4C_DEVICE unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

V4C_DEVICE void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

V4C_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LEFT>
V4C_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
}

V4C_DEVICE void load_matrices(unsigned (&f)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3]) : "r"(shared_address(row)) : "memory");
}

V4C_DEVICE void load_turned(unsigned (&f)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3]) : "r"(shared_address(row)) : "memory");
}

V4C_DEVICE void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

}  // namespace v4c
