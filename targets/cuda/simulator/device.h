// CUDA C++ for g++: what the kernels use of the language and its intrinsics, on threads that `driver.cc` runs by turns.
//
// Copies into shared memory arrive when they are waited for, not before; shared memory of a block starts with what the
// last one left, or NaN. A missing wait or barrier then shows as a wrong result.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <algorithm>

struct SimIndex { unsigned x, y, z; };

extern "C" {
extern SimIndex sim_thread, sim_block, sim_block_dim, sim_grid_dim;
extern unsigned char* sim_shared;               // dynamic shared memory of the block
void sim_block_barrier();
void sim_warp_barrier();
void* sim_lane(int lane);                       // 64 bytes of each lane of this warp, to exchange
void sim_copy(void* to, const void* from, int valid);
void sim_commit();
void sim_wait(int left);
}

#define threadIdx sim_thread
#define blockIdx sim_block
#define blockDim sim_block_dim
#define gridDim sim_grid_dim
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __syncthreads sim_block_barrier

using uint = unsigned;
using uchar = unsigned char;
using ushort = unsigned short;
using std::max;
using std::min;

struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) longlong2 { long long x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __uint_as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned bits; std::memcpy(&bits, &f, 4); return bits; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T> T __ldg(const T* from) { return *from; }
inline int atomicAdd(int* at, int value) { int old = *at; *at += value; return old; }

struct nv_bfloat16 {
  unsigned short bits;
  nv_bfloat16() = default;
  nv_bfloat16(float f) {
    unsigned u = __float_as_uint(f);
    bits = f != f ? 0x7fff : static_cast<unsigned short>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  operator float() const { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
};
struct alignas(4) __nv_bfloat162 { nv_bfloat16 x, y; };
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {nv_bfloat16(x), nv_bfloat16(y)}; }

struct __half { unsigned short bits; };
struct alignas(4) __half2 { __half x, y; };
inline float __half2float(__half h) {
  const float magnitude = (h.bits & 0x7c00) == 0x7c00
      ? __uint_as_float(0x7f800000u | (h.bits & 0x3ffu) << 13)
      : __uint_as_float((h.bits & 0x7fffu) << 13) * 0x1p112f;
  return h.bits & 0x8000 ? -magnitude : magnitude;
}
inline float __low2float(__half2 h) { return __half2float(h.x); }
inline float __high2float(__half2 h) { return __half2float(h.y); }

inline int sim_lane_id() { return static_cast<int>(sim_thread.x % 32); }

// What `of(slots)` gives after every lane has put `value` up, before any lane takes it down.
template <class T, class F>
auto sim_exchange(const T& value, F of) {
  static_assert(sizeof(T) <= 64, "");
  std::memcpy(sim_lane(sim_lane_id()), &value, sizeof(T));
  sim_warp_barrier();
  auto result = of([](int lane) { T from; std::memcpy(&from, sim_lane(lane), sizeof(T)); return from; });
  sim_warp_barrier();
  return result;
}

inline void __syncwarp() { sim_warp_barrier(); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  return sim_exchange(value, [&](auto at) { return at(sim_lane_id() ^ mask); });
}
template <class T> T __shfl_up_sync(unsigned, T value, int by) {
  return sim_exchange(value, [&](auto at) { return at(sim_lane_id() >= by ? sim_lane_id() - by : sim_lane_id()); });
}
inline unsigned __ballot_sync(unsigned, bool value) {
  return sim_exchange(value, [&](auto at) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= static_cast<unsigned>(at(lane)) << lane;
    return all;
  });
}

// Bodies of what kernels/source/common.cuh declares and writes in PTX.
#define V4C_SIMULATED_INTRINSICS                                                                     \
  namespace v4c {                                                                                    \
  V4C_DEVICE void copy_async(void* to, const void* from, bool valid) { sim_copy(to, from, valid); }  \
  V4C_DEVICE void commit_copies() { sim_commit(); }                                                  \
  template <int LEFT> V4C_DEVICE void wait_copies() { sim_wait(LEFT); }                              \
  V4C_DEVICE void load_matrices(unsigned (&f)[4], const void* row) { sim_load_matrices(f, row); }    \
  V4C_DEVICE void load_turned(unsigned (&f)[4], const void* row) { sim_load_turned(f, row); }        \
  V4C_DEVICE void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {        \
    sim_multiply(d, a, b0, b1);                                                                      \
  }                                                                                                  \
  }

// ldmatrix .x4 (PTX ISA, 9.7.14.5.15): lane 8 i + r gives row r of matrix i; lane l gets two numbers of row l / 4 of each.
inline void sim_load_matrices(unsigned (&f)[4], const void* row) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16) __builtin_trap();
  sim_exchange(row, [&](auto at) {
    for (int i = 0; i < 4; ++i)
      std::memcpy(&f[i], static_cast<const char*>(at(i * 8 + sim_lane_id() / 4)) + sim_lane_id() % 4 * 4, 4);
    return 0;
  });
}

// The same with .trans: lane l gets, of each matrix, the numbers at column l / 4 of rows 2 (l % 4) and the next.
inline void sim_load_turned(unsigned (&f)[4], const void* row) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16) __builtin_trap();
  sim_exchange(row, [&](auto at) {
    for (int i = 0; i < 4; ++i) {
      unsigned short pair[2];
      for (int k = 0; k < 2; ++k) {
        const char* from = static_cast<const char*>(at(i * 8 + sim_lane_id() % 4 * 2 + k));
        std::memcpy(&pair[k], from + sim_lane_id() / 4 * 2, 2);
      }
      f[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
    }
    return 0;
  });
}

// mma.m16n8k16 of bfloat16 (PTX ISA, 9.7.14.5.8): where each lane's numbers lie in A, B and D.
inline void sim_multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  struct Held { unsigned a[4], b[2]; };
  const Held mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  sim_exchange(mine, [&](auto at) {
    auto part = [](unsigned word, int k) { return __uint_as_float(k % 2 ? word & 0xffff0000u : word << 16); };
    for (int v = 0; v < 4; ++v) {
      const int row = sim_lane_id() / 4, high = v / 2, column = sim_lane_id() % 4 * 2 + v % 2;
      for (int k = 0; k < 16; ++k) {
        const float x = part(at(row * 4 + k % 8 / 2).a[high + k / 8 * 2], k);
        const float y = part(at(column * 4 + k % 8 / 2).b[k / 8], k);
        d[v] += x * y;
      }
    }
    return 0;
  });
}

// What the driver calls: a kernel with its arguments behind pointers, and their number.
struct SimKernel { void (*call)(void**); int arguments; };

template <class... A, std::size_t... I>
void sim_apply(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}
template <class... A> constexpr int sim_count(void (*)(A...)) { return sizeof...(A); }
template <class... A> void sim_call(void (*kernel)(A...), void** arguments) {
  sim_apply(kernel, arguments, std::index_sequence_for<A...>());
}
