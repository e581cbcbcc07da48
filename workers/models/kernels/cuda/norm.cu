// Layer normalisation of one row a block, in fp32, of one of three inputs: a row as it is, the scaled residual
// ALPHA * normed + branch, or an embedding row looked up by token id, in fp16 or in the packed int8 of a tied head. Written
// as fp16 and, with E4M3, also as e4m3 * scale with one scale a row.
//
// Given at compile time: SIZE, INPUT (PLAIN, RESIDUAL, EMBEDDING, PACKED_EMBEDDING), BRANCH_BF16, E4M3.
#include "device.cuh"

enum { PLAIN, RESIDUAL, EMBEDDING, PACKED_EMBEDDING };

constexpr int VECTORS = SIZE / 8;
constexpr int THREADS = VECTORS >= 512 ? 512 : (VECTORS + WARP - 1) / WARP * WARP;
constexpr int EACH = (VECTORS + THREADS - 1) / THREADS;

static_assert(SIZE % 8 == 0);

DEVICE void widen(const uint4& in, float (&out)[8], bool is_bfloat = false) {
    const u32 words[4] = {in.x, in.y, in.z, in.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = to_float2(words[i]);
        out[i * 2] = is_bfloat ? bfloat_to_float((u16)words[i]) : pair.x;
        out[i * 2 + 1] = is_bfloat ? bfloat_to_float((u16)(words[i] >> 16)) : pair.y;
    }
}

// Eight values of a row of int8 weights in the order of weight_packing.py, beginning at `column`, without their scale.
DEVICE void unpack(const u16* packed, i64 row, int column, float (&out)[8]) {
    const int product = column % 64 / 16;
    const i64 vector = (row / 16 * (SIZE / 64) + column / 64) * 2 + product / 2;
    const i64 pair = vector * 256 + row % 8 * 32 + product % 2 * 4 + column % 16 / 8 * 2 + row % 16 / 8;
#pragma unroll
    for (int t = 0; t < 4; t++) {
        const u16 bytes = packed[pair + t * 8];
        out[t * 2] = (float)((int)(bytes & 0xff) - 128);
        out[t * 2 + 1] = (float)((int)(bytes >> 8) - 128);
    }
}

// x: the row, the branch [T, SIZE] or the embedding [V, SIZE]; row t then looks up token_ids[t], or, with token_rows,
// token_ids[token_rows[t]].
extern "C" __global__ void __launch_bounds__(THREADS)
layer_norm(const u16* x, const u16* normed, const i64* token_ids, const int* token_rows,
           const float* __restrict__ embedding_scales, const u16* __restrict__ weight,
           const u16* __restrict__ bias, u16* out, u8* out_e4m3, float* out_scales, float alpha, float eps) {
    __shared__ float scratch[3][THREADS / WARP];
    const i64 row = blockIdx.x;
    uint4 weights[EACH], biases[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int vector = i * THREADS + threadIdx.x;
        if (vector < VECTORS) {
            weights[i] = reinterpret_cast<const uint4*>(weight)[vector];
            biases[i] = reinterpret_cast<const uint4*>(bias)[vector];
        }
    }
    allow_next_kernel();
    wait_for_previous_kernel();

    i64 source = row;
    if (INPUT == EMBEDDING || INPUT == PACKED_EMBEDDING) source = token_ids[token_rows ? token_rows[row] : row];
    float values[EACH][8] = {};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int vector = i * THREADS + threadIdx.x;
        if (vector < VECTORS) {
            if constexpr (INPUT == PACKED_EMBEDDING) {
                unpack(x, source, vector * 8, values[i]);
#pragma unroll
                for (int j = 0; j < 8; j++) values[i][j] = to_float(to_half(values[i][j] * embedding_scales[source]));
            } else {
                widen(reinterpret_cast<const uint4*>(x + source * SIZE)[vector], values[i], BRANCH_BF16);
            }
            if constexpr (INPUT == RESIDUAL) {
                float residual[8];
                widen(reinterpret_cast<const uint4*>(normed + row * SIZE)[vector], residual);
#pragma unroll
                for (int j = 0; j < 8; j++) values[i][j] += alpha * residual[j];
            }
#pragma unroll
            for (int j = 0; j < 8; j++) sum += values[i][j];
        }
    }
    const float mean = block_sum<THREADS>(sum, scratch[0]) / SIZE;
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (i * THREADS + threadIdx.x < VECTORS) {
#pragma unroll
            for (int j = 0; j < 8; j++) squares += (values[i][j] - mean) * (values[i][j] - mean);
        }
    }
    const float scale = rsqrtf(block_sum<THREADS>(squares, scratch[1]) / SIZE + eps);
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int vector = i * THREADS + threadIdx.x;
        if (vector < VECTORS) {
            float w[8], b[8];
            widen(weights[i], w);
            widen(biases[i], b);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                values[i][j] = (values[i][j] - mean) * scale * w[j] + b[j];
                largest = fmaxf(largest, fabsf(values[i][j]));
            }
            reinterpret_cast<uint4*>(out + row * SIZE)[vector] =
                make_uint4(to_half2(values[i][0], values[i][1]), to_half2(values[i][2], values[i][3]),
                           to_half2(values[i][4], values[i][5]), to_half2(values[i][6], values[i][7]));
        }
    }
#if E4M3 && __CUDA_ARCH__ >= 890
    largest = fmaxf(block_max<THREADS>(largest, scratch[2]), 1e-12f);
    const float inverse = 448.0f / largest;
    if (threadIdx.x == 0) out_scales[row] = largest / 448.0f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int vector = i * THREADS + threadIdx.x;
        if (vector < VECTORS) {
            u32 words[2];
#pragma unroll
            for (int h = 0; h < 2; h++)
                words[h] = to_e4m3x2(values[i][h * 4] * inverse, values[i][h * 4 + 1] * inverse) |
                           (u32)to_e4m3x2(values[i][h * 4 + 2] * inverse, values[i][h * 4 + 3] * inverse) << 16;
            reinterpret_cast<uint2*>(out_e4m3 + row * SIZE)[vector] = make_uint2(words[0], words[1]);
        }
    }
#endif
}
