// GELU, and rows of activations to e4m3 with one scale a row. One block a row.
//
// Given at compile time: SIZE (values a row), INPUT_BF16, GELU, E4M3 (else fp16 is written).
#include "device.cuh"

constexpr int VECTORS = SIZE / 8;
constexpr int THREADS = VECTORS >= 512 ? 512 : (VECTORS + WARP - 1) / WARP * WARP;
constexpr int EACH = (VECTORS + THREADS - 1) / THREADS;

static_assert(SIZE % 8 == 0);

extern "C" __global__ void __launch_bounds__(THREADS)
rows(const u16* x, u16* out, u8* out_e4m3, float* out_scales) {
    __shared__ float scratch[THREADS / WARP];
    const i64 row = blockIdx.x;
    allow_next_kernel();
    wait_for_previous_kernel();
    float values[EACH][8];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int vector = i * THREADS + threadIdx.x;
        if (vector < VECTORS) {
            const uint4 in = reinterpret_cast<const uint4*>(x + row * SIZE)[vector];
            const u32 words[4] = {in.x, in.y, in.z, in.w};
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const u16 bits = (u16)(words[j / 2] >> j % 2 * 16);
                const float value = INPUT_BF16 ? bfloat_to_float(bits) : to_float(bits);
                values[i][j] = GELU ? gelu_tanh(value) : value;
                largest = fmaxf(largest, fabsf(values[i][j]));
            }
        }
    }
#if E4M3
    largest = fmaxf(block_max<THREADS>(largest, scratch), 1e-12f);
    const float inverse = 448.0f / largest;
    if (threadIdx.x == 0) out_scales[row] = largest / 448.0f;
#endif
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int vector = i * THREADS + threadIdx.x;
        if (vector < VECTORS) {
#if !E4M3
            reinterpret_cast<uint4*>(out + row * SIZE)[vector] =
                make_uint4(to_half2(values[i][0], values[i][1]), to_half2(values[i][2], values[i][3]),
                           to_half2(values[i][4], values[i][5]), to_half2(values[i][6], values[i][7]));
#elif __CUDA_ARCH__ >= 890
            u32 words[2];
#pragma unroll
            for (int h = 0; h < 2; h++)
                words[h] = to_e4m3x2(values[i][h * 4] * inverse, values[i][h * 4 + 1] * inverse) |
                           (u32)to_e4m3x2(values[i][h * 4 + 2] * inverse, values[i][h * 4 + 3] * inverse) << 16;
            reinterpret_cast<uint2*>(out_e4m3 + row * SIZE)[vector] = make_uint2(words[0], words[1]);
#endif
        }
    }
}
