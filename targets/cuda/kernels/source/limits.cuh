// What the chip can do at most: reading of memory, and products on the tensor cores that touch none. 256 threads.

namespace v4c {

// Sums of x [n, 4]; sums [blocks, 256].
V4C_DEVICE void stream_read(const float* x, int64_t n, float* sums) {
  float total = 0;
#pragma unroll 8
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < n; i += gridDim.x * 256ll) {
    float values[4];
    Format<float>::load(x + i * 4, values);
    total += (values[0] + values[1]) + (values[2] + values[3]);
  }
  sums[blockIdx.x * 256 + threadIdx.x] = total;
}

// Eight products under way per warp, `rounds` times over; sums [blocks, 256].
V4C_DEVICE void matrix_peak(int64_t rounds, float* sums) {
  float made[8][4];
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int v = 0; v < 4; ++v) made[i][v] = 0;
  const unsigned one = bf16_pair(0.5f, 0.25f), factors[4] = {one, one, one, one};
  for (int64_t round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < 8; ++i) multiply(made[i], factors, one, one);
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) total += made[i][0] + made[i][3];
  sums[blockIdx.x * 256 + threadIdx.x] = total;
}

}  // namespace v4c
