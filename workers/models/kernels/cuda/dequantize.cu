// Packed int4 or int8 weights back to rows: fp16 (value * scale, one rounding) for a matrix product of a large batch, or,
// for int4, e4m3 without the scale (every value of -8..7 is exact in it). One warp a tile of 16 rows x 64 k.
//
// Given at compile time: N, K, FORMAT (INT4, INT8), TO_E4M3.
#include "device.cuh"

enum { INT4, INT8 };

constexpr int CHUNKS = K / 64;
constexpr int VECTORS = FORMAT == INT4 ? 1 : 2;
constexpr int WARPS = 8;
constexpr int PITCH = 72;  // halves; a multiple of 8 that spreads rows over banks

DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

extern "C" __global__ void __launch_bounds__(WARPS * WARP)
dequantize(const u8* __restrict__ weights, const float* __restrict__ scales, u8* out) {
    __shared__ __align__(16) u16 tiles[WARPS][16 * PITCH];
    const int lane = threadIdx.x % WARP;
    u16* shared = tiles[threadIdx.x / WARP];
    allow_next_kernel();
    wait_for_previous_kernel();
    const int index = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (index >= N / 16 * CHUNKS) return;
    const int tile = index / CHUNKS, chunk = index % CHUNKS;
    uint4 w[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; v++) w[v] = load_streaming(weights + (((i64)index * VECTORS + v) * WARP + lane) * 16);
#pragma unroll
    for (int s = 0; s < 4; s++) {
        u32 a[4];
        if constexpr (FORMAT == INT4) {
            dequantize_int4(word(w[0], s), a);
        } else {
            dequantize_int8(word(w[s / 2], s % 2 * 2), a[0], a[1]);
            dequantize_int8(word(w[s / 2], s % 2 * 2 + 1), a[2], a[3]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + i % 2 * 8, column = s * 16 + lane % 4 * 2 + i / 2 * 8;
            u32 value = a[i];
            if (!TO_E4M3) {
                const float2 pair = to_float2(value);
                const float scale = scales[tile * 16 + row];
                value = to_half2(pair.x * scale, pair.y * scale);
            }
            *reinterpret_cast<u32*>(shared + row * PITCH + column) = value;
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = i * 4 + lane / 8, column = lane % 8 * 8;
        const uint4 values = *reinterpret_cast<const uint4*>(shared + row * PITCH + column);
        const i64 at = (i64)(tile * 16 + row) * K + chunk * 64 + column;
#if !TO_E4M3
        *reinterpret_cast<uint4*>(out + at * 2) = values;
#elif __CUDA_ARCH__ >= 890
        u32 packed[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const u32 low = h == 0 ? values.x : values.z, high = h == 0 ? values.y : values.w;
            const float2 a = to_float2(low), b = to_float2(high);
            packed[h] = to_e4m3x2(a.x, a.y) | (u32)to_e4m3x2(b.x, b.y) << 16;
        }
        *reinterpret_cast<uint2*>(out + at) = make_uint2(packed[0], packed[1]);
#endif
    }
}
